"""What a training changes, how exactly it resumes, and what it refuses."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from builders import CLASSES, ListTracker, tiny_adapted, tiny_attack, tiny_backbone, tiny_images, tiny_optim
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import robust_peft as rp
from robust_peft.config import OptimConfig, ValidationConfig
from robust_peft.data import CropFlip, evaluation_loader, train_loader
from robust_peft.training.optim import MovingAverage, make_optimizer, make_schedule

BATCH = 6


def trainer_for(model, **options):
    defaults = {"attack": tiny_attack(), "optim": tiny_optim(), "precision": "fp32", "progress": False}
    return rp.Trainer(model, **(defaults | options))


def copy_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("surgery", [rp.surgery.ConflictAware(gamma=0.8), rp.surgery.Vanilla(), rp.surgery.PCGrad()])
def test_100_steps_move_every_adapter_tensor_and_the_head_and_nothing_else(surgery):
    model = tiny_adapted()
    before = copy_of(model)
    moving = {name for name, p in model.named_parameters() if p.requires_grad}
    result = trainer_for(model, surgery=surgery, optim=tiny_optim(epochs=25)).fit(train_loader(tiny_images(), BATCH))
    assert result.steps == 100
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == moving
    assert any("bottleneck" in name.lower() or "down" in name for name in moving)
    assert any("modules_to_save" in name for name in moving)


def test_training_lowers_both_losses():
    result = trainer_for(tiny_adapted(), optim=tiny_optim(epochs=10)).fit(train_loader(tiny_images(), BATCH))
    steps = [record for record in result.history if record["kind"] == "train"]
    for name in ("clean_loss", "adv_loss"):
        assert sum(r[name] for r in steps[-4:]) < 0.8 * sum(r[name] for r in steps[:4])


class Killed(Exception):
    pass


class KilledAt(nn.Module):
    """Lets the program die at one of its forwards."""

    def __init__(self, model, forwards):
        super().__init__()
        self.model, self.left = model, forwards

    def forward(self, images):
        self.left -= 1
        if self.left == 0:
            raise Killed
        return self.model(images)


def full_run(output, model, *, resume=False, ema=None, drop=0.0, accumulation=1, **fit):
    optim = tiny_optim(epochs=3, schedule="cosine", warmup_epochs=1.0, ema_decay=ema, accumulation=accumulation)
    trainer = trainer_for(
        model,
        optim=optim,
        output=output,
        save_every_steps=1,
        augment=CropFlip(padding=2),
        validation=ValidationConfig(steps=1),
    )
    images = tiny_images()
    return trainer.fit(train_loader(images, BATCH), evaluation_loader(images, 10), resume=resume, **fit)


@pytest.mark.parametrize("options", [{}, {"ema": 0.9}, {"accumulation": 2}], ids=["plain", "ema", "accumulation"])
@pytest.mark.parametrize("drop", [0.0, 0.3], ids=["", "drop-path"])
def test_killed_in_mid_epoch_and_resumed_is_the_same_to_the_bit(tmp_path, options, drop):
    alone = tiny_adapted(drop_path_rate=drop)
    whole = full_run(tmp_path / "alone", alone, **options)

    # 6 to 8 forwards a step: this dies in the second epoch, in the middle of a step.
    dying = KilledAt(tiny_adapted(drop_path_rate=drop), 31)
    with pytest.raises(Killed):
        full_run(tmp_path / "killed", dying, **options)
    state = torch.load(tmp_path / "killed" / "state" / "last.pt", weights_only=True)
    assert state["run"]["epoch"] >= 1 and state["run"]["step"] < whole.steps

    fresh = KilledAt(tiny_adapted(seed=7, drop_path_rate=drop), 10**9)
    # The frozen backbone comes from its checkpoint again; here that is the same seed.
    fresh.model = tiny_adapted(drop_path_rate=drop)
    resumed = full_run(tmp_path / "killed", fresh, resume=True, **options)
    assert resumed.finished and resumed.steps == whole.steps
    expected, found = trained(alone), trained(fresh.model)
    assert expected.keys() == found.keys() and len(found) > 4
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    # The log is the same too, but for what the clock says.
    logs = [
        [json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in ("alone", "killed")
    ]
    for one, other in zip(*logs, strict=True):
        assert {k: v for k, v in one.items() if "second" not in k} == {
            k: v for k, v in other.items() if "second" not in k
        }


def test_time_limit_stops_cleanly_and_resume_goes_on(tmp_path):
    alone = tiny_adapted()
    full_run(tmp_path / "alone", alone)
    pieces = tiny_adapted()
    result = full_run(tmp_path / "pieces", pieces, time_limit=0.0)
    assert not result.finished and result.steps == 1
    count = 1
    while not result.finished:
        pieces = tiny_adapted()
        result = full_run(tmp_path / "pieces", pieces, resume=True, time_limit=0.0)
        count += 1
    assert count == result.steps == 12
    assert all(torch.equal(p, q) for p, q in zip(trained(alone).values(), trained(pieces).values(), strict=True))


def test_accumulation_equals_one_large_batch_in_float64():
    images = tiny_images()
    models = []
    for batch, accumulation in ((12, 1), (4, 3)):
        model = tiny_adapted().double()
        trainer_for(model, optim=tiny_optim(accumulation=accumulation)).fit(train_loader(images, batch))
        models.append(trained(model))
    for name in models[0]:
        torch.testing.assert_close(models[0][name], models[1][name], rtol=1e-9, atol=1e-12)


def test_two_equal_runs_are_equal_to_the_bit():
    runs = []
    for _ in range(2):
        torch.manual_seed(torch.randint(1 << 30, ()).item())  # the caller's generator has no say
        model = tiny_adapted()
        trainer_for(model, augment=CropFlip(padding=2)).fit(train_loader(tiny_images(), BATCH))
        runs.append(trained(model))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_trains_and_stays_finite(precision):
    model = tiny_adapted()
    before = trained(model)
    result = trainer_for(model, precision=precision, optim=tiny_optim(epochs=12)).fit(
        train_loader(tiny_images(), BATCH)
    )
    after = trained(model)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in after.values())
    assert all(not torch.equal(before[name], after[name]) for name in before)
    taken = [r for r in result.history if r["kind"] == "train"]
    # float16 starts with a loss scale that may overflow for a few steps; after that nothing is skipped.
    assert taken[-1]["skipped"] <= (20 if precision == "fp16" else 0)
    # What is logged is unscaled: near what float32 logs for the same batch and the untrained model.
    reference = trainer_for(tiny_adapted(), optim=tiny_optim(lr=1e-12, epochs=12)).fit(
        train_loader(tiny_images(), BATCH)
    )
    first = next(r for r in taken if r["cos"] is not None)
    expected = reference.history[first["step"]]
    assert first["clean_norm"] == pytest.approx(expected["clean_norm"], rel=0.1)
    assert first["adv_norm"] == pytest.approx(expected["adv_norm"], rel=0.1)


def test_clipping_bounds_the_update():
    norms = []
    for clip in (None, 1e-3):
        model = tiny_adapted()
        optim = OptimConfig(
            optimizer="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, epochs=1, schedule="constant", clip_norm=clip
        )
        result = trainer_for(model, optim=optim).fit(train_loader(tiny_images(), BATCH))
        norms.append([r["previous_change_norm"] for r in result.history[1:]])
    assert min(norms[0]) > 1e-2
    assert norms[1] == pytest.approx([1e-3] * len(norms[1]), rel=1e-3)


def test_moving_average_is_what_is_left_in_the_model():
    model = tiny_adapted()
    trainer = trainer_for(model, optim=tiny_optim(ema_decay=0.5))
    values, average = [], None
    original = MovingAverage.update

    def spy(self):
        original(self)
        values.append([p.detach().clone() for p in self.parameters])

    MovingAverage.update = spy
    try:
        start = [p.detach().clone() for _, p in trainer.trainable]
        trainer.fit(train_loader(tiny_images(), BATCH))
    finally:
        MovingAverage.update = original
    average = start
    for step, now in enumerate(values):
        decay = min(0.5, (1 + step) / (10 + step))
        average = [decay * a + (1 - decay) * p for a, p in zip(average, now, strict=True)]
    assert len(values) == 8
    for expected, (_, parameter) in zip(average, trainer.trainable, strict=True):
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-7)


def test_best_weights_are_kept_by_the_stated_metric():
    # Adversarial loss ascends with a huge learning rate: an early epoch is best.
    images = tiny_images()
    model = tiny_adapted()
    trainer = trainer_for(
        model,
        optim=tiny_optim(lr=0.3, epochs=6),
        validation=ValidationConfig(steps=1, keep="best", metric="standard_accuracy"),
    )
    result = trainer.fit(train_loader(images, BATCH), evaluation_loader(images, 10))
    validations = [r for r in result.history if r["kind"] == "validation"]
    assert len(validations) == 6
    assert result.best["standard_accuracy"] == max(r["standard_accuracy"] for r in validations)
    report = rp.evaluate(model, images, [])
    assert report.clean.accuracy == pytest.approx(result.best["standard_accuracy"])


def test_validation_counts_samples_not_batches():
    images = tiny_images(23)
    model = tiny_adapted()
    result = trainer_for(model).fit(train_loader(images, BATCH), evaluation_loader(images, 10))
    assert result.best["total"] == 23
    assert result.best["standard_accuracy"] * 23 == pytest.approx(round(result.best["standard_accuracy"] * 23))


def test_every_step_is_logged_with_what_the_surgery_saw():
    gamma = 0.95
    result = trainer_for(tiny_adapted(), surgery=rp.surgery.ConflictAware(gamma=gamma)).fit(
        train_loader(tiny_images(), BATCH)
    )
    steps = [r for r in result.history if r["kind"] == "train"]
    assert [r["step"] for r in steps] == list(range(8))
    for r in steps:
        assert r["mu"] == pytest.approx(r["clean_norm"] * r["adv_norm"] * (1 - r["cos"]), rel=1e-3, abs=1e-6)
        if r["cos"] >= gamma:
            assert (r["clean_weight"], r["adv_weight"]) == (1.0, 0.0)
        else:
            assert r["adv_weight"] == 1.0 and r["clean_weight"] > 0
        assert {"lr", "update_norm", "cancelled", "ascends_adv", "skipped", "images_per_second"} <= r.keys()


class Poisoned(nn.Module):
    """A model whose logits are NaN at some of its train-mode forwards."""

    def __init__(self, model, bad):
        super().__init__()
        self.model, self.bad, self.count = model, bad, 0

    def forward(self, images):
        logits = self.model(images)
        if self.training:
            self.count += 1
            if self.count in self.bad:
                return logits * float("nan")
        return logits


def test_a_step_with_non_finite_gradients_is_skipped_and_counted():
    model = Poisoned(tiny_adapted(), bad={3})  # the clean pass of step 1
    result = trainer_for(model).fit(train_loader(tiny_images(), BATCH))
    skipped = [r["skipped"] for r in result.history]
    assert skipped == [0, 1, 1, 1, 1, 1, 1, 1]
    assert result.history[2]["previous_change_norm"] == 0.0
    assert all(p.isfinite().all() for p in trained(model).values())


def test_several_in_a_row_stop_the_run_and_name_loss_step_and_state(tmp_path):
    model = Poisoned(tiny_adapted(), bad=set(range(3, 1000)))
    with pytest.raises(FloatingPointError, match=r"loss 'ce'.*5 steps in a row, up to step 5.*state"):
        trainer_for(model, output=tmp_path).fit(train_loader(tiny_images(), BATCH))


def test_trackers_are_told_settings_and_every_step():
    tracker = ListTracker()
    settings = {"optim": {"lr": 0.01}, "blocks": [1, 2]}
    trainer_for(tiny_adapted(), log_with=(tracker,), settings=settings).fit(train_loader(tiny_images(), BATCH))
    assert {"optim.lr": 0.01, "blocks": "[1, 2]", "seed": 0}.items() <= tracker.config.items()
    assert [step for step, _ in tracker.logged] == list(range(8))
    assert all({"cos", "mu", "clean_loss", "adv_loss", "lr"} <= values.keys() for _, values in tracker.logged)


# --- what is refused ---


def test_labels_outside_the_classes():
    data = TensorDataset(torch.rand(12, 3, 16, 16), torch.full((12,), CLASSES))
    with pytest.raises(ValueError, match=r"labels should be in 0\.\.2.*Found labels from 3 to 3"):
        trainer_for(tiny_adapted()).fit(DataLoader(data, 6, drop_last=True))


def test_images_out_of_range():
    data = TensorDataset(torch.rand(12, 3, 16, 16) * 255, torch.zeros(12, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"images should lie in \[0, 1\].*normalisation belongs inside the model"):
        trainer_for(tiny_adapted()).fit(DataLoader(data, 6, drop_last=True))


def test_an_empty_loader():
    data = TensorDataset(torch.rand(3, 3, 16, 16), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="The training loader is empty"):
        trainer_for(tiny_adapted()).fit(DataLoader(data, 6, drop_last=True))


def test_a_loader_of_plain_pairs_works():
    images = tiny_images()
    data = TensorDataset(images.images.float() / 255, images.labels)
    result = trainer_for(tiny_adapted()).fit(DataLoader(data, 5))  # the last batch is smaller
    assert [r["images"] for r in result.history] == [5, 5, 5, 5, 4] * 2


def test_resuming_with_other_settings(tmp_path):
    make = lambda lr: trainer_for(tiny_adapted(), output=tmp_path, settings={"lr": lr})  # noqa: E731
    make(1).fit(train_loader(tiny_images(), BATCH))
    with pytest.raises(ValueError, match="other settings: lr"):
        make(2).fit(train_loader(tiny_images(), BATCH), resume=True)


def test_resuming_without_a_state(tmp_path):
    with pytest.raises(FileNotFoundError, match="saved no state"):
        trainer_for(tiny_adapted(), output=tmp_path).fit(train_loader(tiny_images(), BATCH), resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_with": ("comet",)}, "log_with: comet is not installed"),
        ({"loss": "hinge"}, "loss should be one of ce, trades"),
        ({"precision": "int8"}, "precision should be one of"),
        ({"scope": "layer"}, "scope should be all or tensor"),
        ({"conflict_params": "head"}, "conflict_params should be all or adapters"),
        ({"measure_conflict": False}, "measure_conflict=False is for Vanilla alone"),
        ({"loss": "trades", "attack": tiny_attack(random_start=False)}, "kl.*random_start"),
        ({"optim": OptimConfig(lr=-1.0)}, "lr should be positive"),
    ],
)
def test_settings_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        trainer_for(tiny_adapted(), **options)


def test_a_frozen_model():
    with pytest.raises(ValueError, match="no trainable parameter"):
        trainer_for(tiny_backbone().requires_grad_(False))


def test_another_run_is_not_overwritten_unasked(tmp_path):
    trainer_for(tiny_adapted(), output=tmp_path).fit(train_loader(tiny_images(), BATCH))
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(FileExistsError, match="resume=True"):
        trainer_for(tiny_adapted(), output=tmp_path).fit(train_loader(tiny_images(), BATCH))
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_resuming_with_another_attack_or_rate_is_refused_without_settings_too(tmp_path):
    trainer_for(tiny_adapted(), output=tmp_path).fit(train_loader(tiny_images(), BATCH))
    other = trainer_for(tiny_adapted(), output=tmp_path, attack=tiny_attack(steps=3), optim=tiny_optim(lr=0.5))
    with pytest.raises(ValueError, match="other settings: attack, optim"):
        other.fit(train_loader(tiny_images(), BATCH), resume=True)


def test_an_order_that_cannot_be_resumed_is_refused(tmp_path):
    sampler = torch.utils.data.WeightedRandomSampler([1.0] * 24, 24)
    loader = DataLoader(tiny_images(), 6, sampler=sampler, drop_last=True)
    with pytest.raises(ValueError, match="WeightedRandomSampler cannot be shared"):
        trainer_for(tiny_adapted(), output=tmp_path).fit(loader)


class Convolutional(nn.Module):
    """A network with BatchNorm, running statistics and all."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, CLASSES)

    def forward(self, images):
        return self.head(self.bn(self.conv(images)).mean(dim=(2, 3)))


def test_a_frozen_batchnorm_keeps_its_statistics_and_a_trained_one_learns_them():
    for method, moves in (("linear", False), ("full", True)):
        torch.manual_seed(0)
        model = rp.attach(Convolutional(), method)
        before = {name: b.clone() for name, b in model.named_buffers()}
        trainer_for(model).fit(train_loader(tiny_images(), BATCH))
        moved = {name for name, b in model.named_buffers() if not torch.equal(b, before[name])}
        assert bool(moved) == moves


def test_drop_path_is_itself_again_after_training():
    model = tiny_adapted(drop_path_rate=0.5)
    trainer_for(model).fit(train_loader(tiny_images(), BATCH))
    model.train()
    images = torch.rand(5, 3, 16, 16)  # another batch size than in training
    torch.manual_seed(0)
    first = model(images)
    assert not torch.equal(first, model(images))  # drawn anew
    copied = copy.deepcopy(model).eval()
    assert torch.equal(copied(images), copied(images))
    assert torch.equal(copied(images), model.eval()(images))


# --- optimizer and schedule ---


def test_schedules_against_their_formulas():
    parameter = [("w", nn.Parameter(torch.zeros(2, 2)))]

    def rates(**options):
        config = replace(tiny_optim(lr=1.0, epochs=5), **options)
        optimizer = make_optimizer(parameter, config)
        schedule = make_schedule(optimizer, config, 4)
        found = []
        for _ in range(20):
            found.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        return found

    cosine = rates(schedule="cosine", warmup_epochs=1.0)
    assert cosine[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert cosine[4] == pytest.approx(1.0) and cosine[12] == pytest.approx(0.5) and cosine[19] < 0.02
    one = rates(schedule="onecycle", warmup_epochs=2.0)
    assert max(one) == pytest.approx(1.0, abs=0.03) and one.index(max(one)) in (7, 8)
    assert one[0] == pytest.approx(1 / 25) and one[-1] < 0.02
    assert rates(schedule="constant") == [1.0] * 20


def test_weight_decay_leaves_vectors_out_unless_told():
    named = [("w", nn.Parameter(torch.ones(2, 2))), ("b", nn.Parameter(torch.ones(2)))]
    for decay_vectors in (False, True):
        config = tiny_optim(lr=0.1, weight_decay=0.5, decay_vectors=decay_vectors)
        optimizer = make_optimizer(named, config)
        before = [p.detach().clone() for _, p in named]
        for _, p in named:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        moved = [not torch.equal(p, q) for (_, p), q in zip(named, before, strict=True)]
        assert moved == [True, decay_vectors]
