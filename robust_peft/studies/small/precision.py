"""Is accuracy the price of speed? The demo's task in float32, in bfloat16 as `--precision auto` takes it where the
hardware multiplies it, and that compiled."""

from robust_peft.studies.study import Measurement, Method, Study


def study() -> Study:
    return Study(
        name="small-precision",
        question="Does training in bfloat16, eager or compiled, give the accuracies that float32 gives?",
        base="quickstart",
        methods=(
            Method("float32", settings={"precision": "fp32"}),
            Method("bfloat16", settings={"precision": "bf16"}),
            Method("bfloat16, compiled", settings={"precision": "bf16", "compile": True}),
        ),
        seeds=range(3),
        measure=Measurement(("clean", "pgd-10"), split="test"),  # nothing is chosen by it
        confirm=None,
    )
