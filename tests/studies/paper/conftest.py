"""Records of the paper's studies without any training."""

import zlib

import pytest

from robust_peft.studies.records import Record, Verdicts
from robust_peft.studies.work import attacks_by_norm
from robust_peft.threat import ThreatModel


class MadeUp:
    """Verdicts that follow from what they are of: each attack leaves the first so many images right."""

    images = 40

    def right(self, point, attack, threat):
        """How many images are right; under an attack fewer than without one."""
        clean = 30 + zlib.crc32(f"{point.panel_name} {point.method.name} {point.seed}".encode()) % 10
        return clean if attack == "clean" else zlib.crc32(f"{point.name} {attack} {threat}".encode()) % clean

    def verdicts(self, point, attack, threat):
        count = self.right(point, attack, threat)
        return Verdicts(attack, threat, {image: image < count for image in range(self.images)})

    def records(self, study, folder):
        """Every run measured as the study's measurement says."""
        found = []
        for point in study.points():
            own = (point.config.threat.norm, point.config.threat.eps)
            budgets = [own, *study.measure.budgets(own[0])]
            attacks = attacks_by_norm(study.measure.attacks, [norm for norm, _ in budgets])
            measured = [self.verdicts(point, "clean", "")]
            for norm, threat in dict.fromkeys((norm, str(ThreatModel(norm, eps))) for norm, eps in budgets):
                measured += [self.verdicts(point, attack, threat) for attack in attacks[norm] if attack != "clean"]
            found.append(
                Record(
                    key=point.key,
                    panel=dict(point.panel),
                    family=point.method.family,
                    label=point.method.label,
                    seed=point.seed,
                    folder=folder / "runs" / point.folder,
                    status="done",
                    measured=tuple(measured),
                )
            )
        return found


@pytest.fixture
def made_up():
    return MadeUp()
