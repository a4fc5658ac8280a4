"""What the small studies have in common."""

from robust_peft.studies.study import Measurement, Settings

SETTINGS: Settings = {
    "data.limit": 2500,  # 50 steps of 50 images
    "precision": "bf16",
    "evaluation.precision": "bf16",  # of the search for adversarial images; each is confirmed in float32
    "evaluation.batch_size": 100,
}
SEARCH = Measurement(("clean", "apgd-ce-20", "t-apgd-dlr-10"), split="validation", limit=200)
