"""The synthetic experiment: training against autograd on Eq. 3, measures against loops, and what is written."""

import csv
import json
import math

import pytest
import torch

import robust_peft as rp
from robust_peft.data import ImageSet, Splits
from robust_peft.studies.linear_model import (
    LogisticRegression,
    exponent,
    largest_eigenvalues,
    mixed_derivative,
    worst_images,
)
from robust_peft.studies.synthetic import (
    accuracies,
    embed,
    measure,
    neighbours_of_other_kind,
    run_study,
    train,
    two_digits,
)
from robust_peft.studies.synthetic_report import describe, write_study

SIDE = 4
SETTINGS = {"surgery": rp.surgery.Vanilla(0.3), "epochs": 3, "lr": 0.5, "batch_size": 7, "seed": 3}


def image_set(count, seed, name="train"):
    """Digits 0, 1 and 2 that a line tells apart, with noise; three equal channels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    grey = torch.randint(0, 100, (count, 1, SIDE, SIDE), generator=generator)
    grey[labels == 2, :, :2] += 120
    grey[labels == 1, :, 2:] += 120
    return ImageSet(grey.to(torch.uint8).expand(-1, 3, -1, -1).contiguous(), labels, tuple("012"), name)


@pytest.fixture(scope="module")
def splits():
    return Splits(image_set(60, 0), None, image_set(30, 1, "test"))


@pytest.fixture(scope="module")
def results(splits):
    return run_study(splits, budgets=(0.05, 0.1, 0.3), epochs=4, batch_size=10, tsne_samples=12)


def test_two_digits(splits):
    images, labels = two_digits(splits.test, (1, 2))
    chosen = splits.test.labels > 0
    assert images.shape == (20, 1, SIDE, SIDE) and images.dtype == torch.float64
    assert torch.equal(images.squeeze(1) * 255, splits.test.images[chosen][:, 0].double())
    assert labels.tolist() == (splits.test.labels[chosen] - 1).tolist()


@pytest.mark.parametrize("budget", [0.1, 0.3])
def test_training_is_autograd_on_equation_3(splits, budget):
    images, labels = two_digits(splits.train)
    found = train(images, labels, rp.ThreatModel("linf", budget, None), **SETTINGS)

    flat, y = images.flatten(1), 2.0 * labels - 1
    generator = torch.Generator().manual_seed(SETTINGS["seed"])
    start = (2 * torch.rand(SIDE**2 + 1, generator=generator, dtype=torch.float64) - 1) / SIDE
    weight, bias = start[:-1].clone().requires_grad_(), start[-1].clone().requires_grad_()
    optimizer = torch.optim.SGD([weight, bias], lr=SETTINGS["lr"])
    for _ in range(SETTINGS["epochs"]):
        for batch in torch.randperm(len(flat), generator=generator).split(SETTINGS["batch_size"]):
            margin = y[batch] * (flat[batch] @ weight + bias)
            adv_loss = torch.log(1 + torch.exp(-margin + budget * weight.abs().sum())).mean()
            loss = 0.3 * adv_loss + 0.7 * torch.log(1 + torch.exp(-margin)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(found.weight, weight, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.bias, bias, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm, budget, box", [("linf", 0.2, None), ("linf", 0.2, (0, 1)), ("l2", 0.7, (0, 1))])
def test_measures_against_a_loop_over_samples(splits, norm, budget, box):
    images, labels = two_digits(splits.train)
    threat = rp.ThreatModel(norm, budget, box)
    model = train(images, labels, threat, **SETTINGS)
    found = measure(model, images, labels, threat)

    pairs = []
    for image, label in zip(images.flatten(1), labels, strict=True):
        worst = worst_images(model, image[None], label[None], threat)[0]
        pair = []
        for x in (image, worst):
            loss = model.loss(x[None], label[None]).sum()
            pair.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
        pairs.append(pair)

    def mu(clean, adv):
        return float(clean.norm() * adv.norm() - clean @ adv)

    assert found["per sample"]["mu"] == pytest.approx(sum(mu(*p) for p in pairs) / len(pairs), rel=1e-9)
    norms = sum(float(adv.norm()) for _, adv in pairs) / len(pairs)
    assert found["per sample"]["adv_norm"] == pytest.approx(norms, rel=1e-9)
    mean = [torch.stack(side).mean(0) for side in zip(*pairs, strict=True)]
    assert found["per batch"]["mu"] == pytest.approx(mu(*mean), rel=1e-9)
    assert found["per batch"]["clean_norm"] == pytest.approx(float(mean[0].norm()), rel=1e-9)
    reach = budget**2 * (SIDE**2 if norm == "linf" else 1)
    bounds = 0.5 * largest_eigenvalues(model, images, labels) * reach
    assert found["per sample"]["bound"] == pytest.approx(float(bounds.mean()), rel=1e-9)
    above = [mu(*p) > float(b) for p, b in zip(pairs, bounds, strict=True)]
    assert found["per sample"]["above_bound"] == sum(above) / len(above)
    h = mixed_derivative(model, images, labels)
    together = 0.5 * float(torch.linalg.eigvalsh((h @ h.mT).mean(0))[-1]) * reach
    assert found["per batch"]["bound"] == pytest.approx(together, rel=1e-9)


def test_adversarial_accuracy_counts_what_the_margin_leaves():
    model = LogisticRegression(torch.tensor([1.0, -1.0]), torch.tensor(0.4))
    images = torch.tensor([[0.9, 0.0], [0.1, 0.0], [0.0, 0.95], [0.3, 0.9]])
    labels = torch.tensor([1, 1, 0, 1])
    standard, adversarial = accuracies(model, images, labels, rp.ThreatModel("linf", 0.3, None))
    assert (standard.correct, adversarial.correct) == (3, 1)  # margins 1.3, 0.5, 0.55, -0.2; the budget takes 0.6
    boxed = accuracies(model, images, labels, rp.ThreatModel("linf", 0.3))[1]
    assert boxed.correct == 2  # a pixel at 0.1 gives only 0.1


def test_neighbours():
    cloud = torch.rand(20, 5, generator=torch.Generator().manual_seed(0))
    assert neighbours_of_other_kind(cloud, cloud + 100) == 0
    assert neighbours_of_other_kind(cloud, cloud + 1e-6) == 1


def test_embedding_is_the_same_each_time():
    points = torch.rand(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert embed(points, 0).shape == (12, 2) and torch.equal(embed(points, 0), embed(points, 0))


def test_study(splits, results):
    rows = results["rows"]
    assert [(row["box"], row["budget"]) for row in rows] == [
        (b, e) for b in ("no box", "box") for e in (0.05, 0.1, 0.3)
    ]
    assert all(row["standard_accuracy"]["total"] == 20 for row in rows)
    found = exponent([0.05, 0.1, 0.3], [row["per batch"]["mu"] for row in rows[3:]])
    assert results["exponents"]["box"]["per batch"]["mu"] == found
    # The last model of each kind is the one that training alone gives.
    images, labels = two_digits(splits.train)
    threat = rp.ThreatModel("linf", 0.3)
    model = train(images, labels, threat, surgery=rp.surgery.Vanilla(0.5), epochs=4, lr=0.03, batch_size=10, seed=0)
    assert rows[-1]["per sample"] == measure(model, images, labels, threat)["per sample"]
    # Around one model the linearised mu keeps the bound and its exponent is 2 for small budgets.
    for scope in ("per sample", "per batch"):
        assert all(row[scope]["mu_linearised"] <= row[scope]["bound"] for row in results["fixed"])
        exponents = results["fixed_exponents"]["two smallest budgets"][scope]
        assert abs(exponents["mu_linearised"] - 2) < 0.1 and abs(exponents["mu"] - 2) < 0.1
    assert [entry["budget"] for entry in results["tsne"]] == [0.05, 0.1, 0.3]
    assert len(results["tsne"][0]["clean"]) == len(results["tsne"][0]["adversarial"]) == 12
    shorter = run_study(splits, budgets=(0.05, 0.1, 0.3), epochs=4, batch_size=10, tsne_samples=0)
    assert shorter["rows"] == rows and shorter["tsne"] == []


@pytest.mark.parametrize("budgets", [(0.1,), (0.2, 0.1), (0.0, 0.1), (0.1, 0.1)])
def test_budgets_that_are_refused(splits, budgets):
    with pytest.raises(ValueError, match="rising positive numbers"):
        run_study(splits, budgets=budgets)


def test_what_is_written(results, tmp_path):
    written = write_study(results, tmp_path)
    assert sorted(path.name for path in written) == sorted(path.name for path in tmp_path.iterdir())
    assert json.loads((tmp_path / "results.json").read_text()) == results
    pictures = {path.name for path in written if path.suffix == ".png"}
    kinds = {f"fig2b-{what}-{box}.png" for what in ("accuracy", "mu", "parts") for box in ("no-box", "box")}
    assert pictures == kinds | {"fig2a-tsne.png", "fixed-model.png"}
    with (tmp_path / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["model"] for line in lines] == ["retrained"] * 6 + ["fixed"] * len(results["fixed"])
    assert float(lines[4]["per_batch_mu"]) == results["rows"][4]["per batch"]["mu"]
    assert float(lines[0]["standard_accuracy_low"]) == results["rows"][0]["standard_accuracy"]["interval"][0]
    tables = (tmp_path / "tables.md").read_text()
    assert tables == describe(results)
    found = results["exponents"]["no box"]["per sample"]["mu"]
    assert f"Exponent in the budget (0.05 to 0.3, retrained): mu {found:.2f}" in tables
    assert tables.count("the paper: almost 2") == 8  # both boxes and two ranges around one model, per sample and batch
    assert not any(math.isnan(float(value)) for line in lines for value in line.values() if value[:1].isdigit())
