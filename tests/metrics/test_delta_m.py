"""delta_m against published tables: the rows are fixtures, the printed number is the oracle."""

import math

import numpy as np
import pytest
import torch

from lightning_mtl.metrics import delta_m

# NYUv2, SegNet-MTAN, as printed in NTKMTL table 1: mIoU, pixel accuracy | absolute, relative error | mean and
# median angle, share below 11.25, 22.5, 30 degrees | delta m as printed, delta m weighted by task (or None).
NYUV2_HIGHER = [True, True, False, False, False, False, True, True, True]
NYUV2_GROUPS = ["segmentation"] * 2 + ["depth"] * 2 + ["normals"] * 5
NYUV2_STL = [38.30, 63.76, 0.6754, 0.2780, 25.01, 19.21, 30.14, 57.20, 69.15]
NYUV2 = {
    "LS": ([39.29, 65.33, 0.5493, 0.2263, 28.15, 23.96, 22.09, 47.50, 61.08], 5.59, -0.88),
    "SI": ([38.45, 64.27, 0.5354, 0.2201, 27.60, 23.37, 22.53, 48.57, 62.32], 4.39, None),
    "RLW": ([37.17, 63.77, 0.5759, 0.2410, 28.27, 24.18, 22.26, 47.05, 60.62], 7.78, None),
    "DWA": ([39.11, 65.31, 0.5510, 0.2285, 27.61, 23.18, 24.17, 50.18, 62.39], 3.57, None),
    "UW": ([36.87, 63.17, 0.5446, 0.2260, 27.04, 22.61, 23.54, 49.05, 63.65], 4.05, -0.91),
    "MGDA": ([30.47, 59.90, 0.6070, 0.2555, 24.88, 19.45, 29.18, 56.88, 69.36], 1.38, 1.66),
    "GradDrop": ([39.39, 65.12, 0.5455, 0.2279, 27.48, 22.96, 23.38, 49.44, 62.87], 3.58, None),
    "PCGrad": ([38.06, 64.64, 0.5550, 0.2325, 27.41, 22.80, 23.86, 49.83, 63.14], 3.97, -1.11),
    "CAGrad": ([39.79, 65.49, 0.5486, 0.2250, 26.31, 21.58, 25.61, 52.36, 65.58], 0.20, -4.33),
    "Aligned": ([40.15, 66.05, 0.5520, 0.2291, 25.37, 19.89, 28.30, 55.29, 67.95], -3.12, -6.30),
    "FAMO": ([38.88, 64.90, 0.5474, 0.2194, 25.06, 19.57, 29.21, 56.61, 68.98], -4.10, -6.79),
    "FairGrad": ([39.74, 66.01, 0.5377, 0.2236, 24.84, 19.60, 29.26, 56.58, 69.16], -4.66, -7.52),
    "GO4Align": ([40.42, 65.37, 0.5492, 0.2167, 24.76, 18.94, 30.54, 57.87, 69.84], -6.08, None),
    "NTKMTL": ([39.68, 65.43, 0.5296, 0.2168, 24.24, 18.63, 30.74, 58.72, 70.78], -6.99, None),
}

# Cityscapes, two tasks, NTKMTL table 7: mIoU, pixel accuracy | absolute, relative error | delta m as printed,
# delta m recomputed from the printed cells, which are rounded: hence two tolerances.
CITYSCAPES_HIGHER = [True, True, False, False]
CITYSCAPES_STL = [74.01, 93.16, 0.0125, 27.77]
CITYSCAPES = {
    "LS": ([75.18, 93.49, 0.0155, 46.77], 22.60, 22.62),
    "UW": ([72.02, 92.85, 0.0140, 30.13], 5.89, 5.88),
    "MGDA": ([68.84, 91.54, 0.0309, 33.50], 44.14, 44.14),
    "PCGrad": ([75.13, 93.48, 0.0154, 42.07], 18.29, 18.21),
    "CAGrad": ([75.16, 93.48, 0.0141, 37.60], 11.64, 11.58),
    "IMTL-G": ([75.33, 93.49, 0.0135, 38.41], 11.10, 11.04),
    "Nash-MTL": ([75.41, 93.66, 0.0129, 35.02], 6.82, 6.72),
    "FAMO": ([74.54, 93.29, 0.0145, 32.59], 8.13, 8.13),
    "FairGrad": ([75.72, 93.68, 0.0134, 32.25], 5.18, 5.12),
    "Aligned": ([75.77, 93.69, 0.0133, 32.66], 5.27, 5.27),
}

# CelebA, F1 of 40 attributes: single task (Cranial-XIX/FAMO issue 2), FairGrad (OptMN-Lab/FairGrad issue 1).
CELEBA_STL = """
    0.6736886 0.68121034 0.81524944 0.5760289 0.7205613 0.8555076 0.38203922 0.58225113 0.787647 0.8321292
    0.5029583 0.68694085 0.6781237 0.5240381 0.5161666 0.95694304 0.6968786 0.67976356 0.8808315 0.8582131
    0.97034 0.93267566 0.5057539 0.40307626 0.9703734 0.48644206 0.60786104 0.5261031 0.56907415 0.59815097
    0.6858371 0.924108 0.5424991 0.7406311 0.71019936 0.87365365 0.9305602 0.33704284 0.7647628 0.91907
"""
CELEBA_FAIRGRAD = """
    0.673481 0.6715126 0.80895394 0.59129095 0.716146 0.84868795 0.5293899 0.6024346 0.79252076 0.8232979
    0.49155608 0.68601424 0.6678187 0.50076723 0.5353463 0.9543982 0.6991702 0.6246493 0.87510586 0.85260683
    0.9679586 0.91303086 0.53938675 0.44097534 0.9698319 0.30875763 0.5560105 0.5475425 0.5299987 0.6050991
    0.72113657 0.9100189 0.48792267 0.6447788 0.7013081 0.8596742 0.92936283 0.40353844 0.7261722 0.9126637
"""


@pytest.mark.parametrize("method", NYUV2)
def test_nyuv2(method: str) -> None:
    row, printed, by_task = NYUV2[method]
    assert delta_m(row, NYUV2_STL, NYUV2_HIGHER) == pytest.approx(printed, abs=0.02)
    if by_task is not None:
        assert delta_m(row, NYUV2_STL, NYUV2_HIGHER, groups=NYUV2_GROUPS) == pytest.approx(by_task, abs=0.02)


@pytest.mark.parametrize("method", CITYSCAPES)
def test_cityscapes(method: str) -> None:
    row, printed, recomputed = CITYSCAPES[method]
    value = delta_m(row, CITYSCAPES_STL, CITYSCAPES_HIGHER)
    assert value == pytest.approx(recomputed, abs=0.01)
    assert value == pytest.approx(printed, abs=0.105)


def test_celeba_with_forty_tasks() -> None:
    stl, fairgrad = ([float(cell) for cell in text.split()] for text in (CELEBA_STL, CELEBA_FAIRGRAD))
    assert len(stl) == len(fairgrad) == 40
    assert delta_m(fairgrad, stl, [True] * 40) == pytest.approx(0.370, abs=0.001)


def test_names_and_order_agree() -> None:
    names = ["mIoU", "pixel", "abs", "rel"]
    by_name = [dict(zip(names, values, strict=True)) for values in (CITYSCAPES["LS"][0], CITYSCAPES_STL)]
    higher = dict(zip(reversed(names), reversed(CITYSCAPES_HIGHER), strict=True))
    assert delta_m(*by_name, higher) == delta_m(CITYSCAPES["LS"][0], CITYSCAPES_STL, CITYSCAPES_HIGHER)


def test_tensors_and_arrays() -> None:
    assert delta_m(torch.tensor([0.5]), np.array([1.0]), [True]) == 50.0
    assert delta_m({"a": torch.tensor(3.0)}, {"a": 2}, {"a": False}) == 50.0


def test_sign_and_draw() -> None:
    assert delta_m([1.0, 2.0], [1.0, 2.0], [True, False]) == 0.0
    assert delta_m([1.1], [1.0], [True]) < 0 < delta_m([1.1], [1.0], [False])


def test_groups_of_one_change_nothing() -> None:
    row, base = CITYSCAPES["LS"][0], CITYSCAPES_STL
    plain = delta_m(row, base, CITYSCAPES_HIGHER)
    assert delta_m(row, base, CITYSCAPES_HIGHER, groups=range(4)) == pytest.approx(plain)
    assert delta_m(row, base, CITYSCAPES_HIGHER, groups=["one"] * 4) == pytest.approx(plain)


def test_a_diverged_run_is_not_hidden() -> None:
    assert math.isnan(delta_m([1.0, math.nan], [1.0, 1.0], [True, True]))
    assert delta_m([math.inf], [1.0], [False]) == math.inf


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        (
            ({"a": 1.0}, {"b": 1.0}, {"a": True}),
            ValueError,
            r"`base` .* metrics of `result` \('a'\), got 'b'",
        ),
        (([1.0], [1.0, 2.0], [True]), ValueError, "`base` must .* got 0, 1"),
        (([1.0], [1.0], [True, False]), ValueError, "`higher` must have the metrics"),
        (([1.0], [1.0], [True], ["a", "b"]), ValueError, "`groups` must have the metrics"),
        (({"a": 1.0}, [1.0], [True]), ValueError, "Give every argument the same names"),
        (([], [], []), ValueError, "`result` must have at least one metric"),
        (
            ({"a": 1.0}, {"a": 0.0}, {"a": True}),
            ValueError,
            r"`base\['a'\]` must be positive and finite, got 0.0",
        ),
        (([1.0], [-1.0], [True]), ValueError, r"`base\[0\]` must be positive"),
        (([1.0], [math.nan], [True]), ValueError, r"`base\[0\]` must be positive and finite, got nan"),
        (([1.0], [1.0], ["accuracy"]), TypeError, r"`higher\[0\]` must be True or False, got 'accuracy'"),
        (
            (1.0, [1.0], [True]),
            TypeError,
            "`result` must be a mapping of metric names or a sequence, got 1.0",
        ),
        (([1.0], "one", [True]), TypeError, "`base` must be a mapping .* got 'one'"),
    ],
)
def test_errors(arguments: tuple, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^delta_m: .*{text}"):
        delta_m(*arguments)


def test_auxiliary_tasks_do_not_count() -> None:
    result, base, higher = {"a": 0.4, "b": 2.0, "c": 9.0}, {"a": 0.8, "b": 1.0, "c": 0.0}, dict.fromkeys("abc", True)
    higher["b"] = False
    assert delta_m(result, base, higher, auxiliary={"c"}) == pytest.approx(75.0)
    assert delta_m(result, base, higher, auxiliary=["b", "c"]) == pytest.approx(50.0)
    groups = {"a": "main", "b": "main", "c": "helper"}
    assert delta_m(result, base, higher, groups, auxiliary=["helper"]) == pytest.approx(75.0)
    assert delta_m([0.4, 2.0], [0.8, 1.0], [True, False], auxiliary=[1]) == pytest.approx(50.0)


@pytest.mark.parametrize("auxiliary", ["a", ["a", "b"], ["x"], [["a"]]])
def test_what_is_auxiliary_must_be_known_and_leave_something(auxiliary) -> None:
    with pytest.raises(ValueError, match=r"^delta_m: `auxiliary` must be a collection of some"):
        delta_m({"a": 0.4, "b": 2.0}, {"a": 0.8, "b": 1.0}, {"a": True, "b": False}, auxiliary=auxiliary)


@pytest.mark.parametrize("auxiliary", [None, 3, iter(["a"])], ids=["None", "number", "iterator"])
def test_what_is_auxiliary_is_a_collection(auxiliary) -> None:
    with pytest.raises(TypeError, match=r"^delta_m: `auxiliary` must be a collection of some"):
        delta_m({"a": 0.4, "b": 2.0}, {"a": 0.8, "b": 1.0}, {"a": True, "b": False}, auxiliary=auxiliary)
