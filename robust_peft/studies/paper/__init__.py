"""The experiments of the CA-AT paper ("Conflict-Aware Adversarial Training") as studies, one module for each figure or
table: ``robust-peft study run paper/fig6 --scale tiny``. docs/paper_studies.md lists them.

Each module has ``study(scale)``; where the paper shows more than a front, ``extra(study, records, output)`` makes the
report's further sections.
"""
