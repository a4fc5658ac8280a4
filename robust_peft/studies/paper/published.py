"""The numbers that the paper prints, as fractions: table -> (panel, method, threat model) -> column -> accuracy.

The threat model is empty where the column names it. What is only drawn in the paper is not here. These are no reference
values: the paper's attacks were weaker than the ones here, see docs/paper_studies.md.
"""

from __future__ import annotations

Published = dict[tuple[str, str, str], dict[str, float]]

STANDARD, MEAN = "standard", "mean over attacks"
STANDARD_TRAINING, VANILLA = "vanilla (lam 0.0)", "vanilla (lam 0.5)"
CA_AT, CA_AT_09 = "CA-AT (gamma 0.8)", "CA-AT (gamma 0.9)"


def _side_by_side(columns: tuple[str, ...], rows: dict[tuple[str, str], tuple[float, ...]]) -> Published:
    """Rows (panel, threat model) in which each column has two entries, CA-AT's and vanilla's."""
    found: Published = {}
    for (panel, threat), values in rows.items():
        for method, own in ((CA_AT, values[::2]), (VANILLA, values[1::2])):
            found[panel, method, threat] = dict(zip(columns, own, strict=True))
    return found


def _rows(columns: tuple[str, ...], rows: dict[tuple[str, str], tuple[float, ...]]) -> Published:
    """Rows (panel, method) with one entry for each column."""
    return {(panel, method, ""): dict(zip(columns, values, strict=True)) for (panel, method), values in rows.items()}


TABLE_1 = _side_by_side(
    (STANDARD, "PGD", "AutoPGD", "MI-FGSM", "FAB", "T-FAB", "FGSM"),
    {
        ("ResNet-18", "L-inf 8/255"): (0.8659, 0.8239, 0.7442, 0.4703, 0.6301, 0.3996, 0.7419, 0.4745, 0.8177, 0.809,
                                       0.6861, 0.6538, 0.7649, 0.519),
        ("ResNet-18", "L-inf 16/255"): (0.8659, 0.8239, 0.7311, 0.4248, 0.5555, 0.2486, 0.7233, 0.4225, 0.7475, 0.78,
                                        0.5445, 0.5104, 0.7435, 0.4387),
        ("ResNet-18", "L-inf 24/255"): (0.8659, 0.8239, 0.7189, 0.405, 0.4886, 0.1963, 0.7182, 0.413, 0.6858, 0.7333,
                                        0.4599, 0.4783, 0.7235, 0.403),
        ("ResNet-18", "L-inf 32/255"): (0.8659, 0.8239, 0.7033, 0.3877, 0.4455, 0.1589, 0.7182, 0.413, 0.6402, 0.6836,
                                        0.4044, 0.4507, 0.7066, 0.379),
        ("ResNet-34", "L-inf 8/255"): (0.8753, 0.8305, 0.8098, 0.5973, 0.7285, 0.4417, 0.8111, 0.5983, 0.8247, 0.8068,
                                       0.7274, 0.6951, 0.8149, 0.5327),
        ("ResNet-34", "L-inf 16/255"): (0.8753, 0.8305, 0.8034, 0.5756, 0.6793, 0.3395, 0.8077, 0.5791, 0.7738, 0.7613,
                                        0.6013, 0.5762, 0.7916, 0.2762),
        ("ResNet-34", "L-inf 24/255"): (0.8753, 0.8305, 0.7957, 0.5602, 0.6445, 0.2859, 0.8067, 0.5743, 0.7307, 0.6937,
                                        0.5142, 0.5174, 0.7743, 0.1428),
        ("ResNet-34", "L-inf 32/255"): (0.8753, 0.8305, 0.785, 0.5443, 0.6165, 0.2498, 0.8067, 0.5743, 0.6918, 0.6221,
                                        0.4424, 0.4822, 0.7616, 0.088),
    },
)  # fmt: skip

TABLE_2 = _rows(
    (STANDARD, "T-AutoPGD-DLR", "T-AutoPGD-L2", "T-FAB", "FGSM", "PGD", "AutoPGD", "MI-FGSM", "FAB", "PGD-L2",
     "AutoPGD-L2", "AutoAttack", MEAN),
    {
        ("ResNet-18, PGD", CA_AT): (0.8659, 0.4004, 0.5356, 0.6861, 0.7649, 0.7442, 0.6301, 0.7419, 0.8177, 0.8211,
                                    0.67, 0.3517, 0.6512),
        ("ResNet-18, PGD-DLR", CA_AT): (0.8646, 0.4147, 0.539, 0.7168, 0.7452, 0.672, 0.6429, 0.6864, 0.8001, 0.8196,
                                        0.6919, 0.3260, 0.6413),
        ("ResNet-18, PGD", CA_AT_09): (0.9009, 0.2844, 0.5075, 0.6986, 0.7781, 0.7021, 0.6624, 0.7251, 0.8371, 0.8588,
                                       0.7267, 0.2472, 0.6389),
        ("ResNet-18, PGD-DLR", CA_AT_09): (0.8923, 0.3794, 0.5353, 0.6874, 0.779, 0.7207, 0.6428, 0.7315, 0.8229,
                                           0.8488, 0.7038, 0.2992, 0.6501),
    },
)  # fmt: skip

TABLE_3 = _rows(
    (STANDARD, "DDN", "C&W", "Square"),
    {
        ("ResNet-18", STANDARD_TRAINING): (0.9392, 0.133, 0.1171, 0.6795),
        ("ResNet-18", VANILLA): (0.8239, 0.4585, 0.4565, 0.7329),
        ("ResNet-18", CA_AT): (0.8659, 0.5991, 0.5089, 0.7656),
        ("ResNet-34", STANDARD_TRAINING): (0.9363, 0.1036, 0.088, 0.6771),
        ("ResNet-34", VANILLA): (0.8305, 0.5411, 0.4747, 0.7429),
        ("ResNet-34", CA_AT): (0.8753, 0.7207, 0.4885, 0.7934),
    },
)

TABLE_4 = _side_by_side(
    ("PGD", "AutoPGD", "T-AutoPGD"),
    {
        ("ResNet-18", "L2 0.5"): (0.8211, 0.7759, 0.67, 0.5222, 0.5356, 0.5327),
        ("ResNet-18", "L2 1"): (0.8207, 0.7748, 0.603, 0.3036, 0.261, 0.2762),
        ("ResNet-18", "L2 1.5"): (0.8194, 0.7738, 0.5652, 0.2405, 0.1483, 0.1428),
        ("ResNet-18", "L2 2"): (0.8187, 0.7734, 0.5331, 0.2115, 0.0904, 0.088),
        ("ResNet-34", "L2 0.5"): (0.8411, 0.78, 0.7534, 0.5255, 0.5301, 0.5325),
        ("ResNet-34", "L2 1"): (0.8412, 0.7791, 0.7249, 0.3806, 0.2571, 0.2683),
        ("ResNet-34", "L2 1.5"): (0.8403, 0.7784, 0.7022, 0.3462, 0.1446, 0.1438),
        ("ResNet-34", "L2 2"): (0.8386, 0.7781, 0.679, 0.3196, 0.0899, 0.0905),
    },
)

TABLE_5 = _rows(
    (STANDARD, "T-AutoPGD", "T-FAB", "FGSM", "PGD", "AutoPGD", "MI-FGSM", "FAB"),
    {
        ("ResNet-18", VANILLA): (0.83, 0.5344, 0.657, 0.6017, 0.5343, 0.2666, 0.4483, 0.55),
        ("ResNet-18", CA_AT): (0.8848, 0.5381, 0.6826, 0.7953, 0.782, 0.669, 0.7859, 0.8151),
        ("ResNet-34", VANILLA): (0.82, 0.3624, 0.503, 0.4832, 0.3466, 0.2479, 0.3359, 0.6284),
        ("ResNet-34", CA_AT): (0.8857, 0.4922, 0.7357, 0.8297, 0.8466, 0.7687, 0.8466, 0.8299),
    },
)
