"""Normalisers: exact inverses, ranges, constants, fitting in pieces, saving and restoring."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_allclose, assert_array_equal

from mpd_gym.datasets import fitting
from mpd_gym.datasets.fitting import KNOTS, NormalizerFitter, fit_normalizer
from mpd_gym.datasets.normalizers import (
    KINDS,
    AffineNormalizer,
    CdfNormalizer,
    normalizer_from_arrays,
)
from mpd_gym.errors import CheckpointError, ConfigError, InputError
from mpd_gym.types import Array

finite = st.floats(-1e6, 1e6, allow_subnormal=True)
few = st.sampled_from([-1.0, 0.0, 0.25, 1.0, 1.0 + 2**-52, 3e5])  # ties, and neighbours in float64
tables = arrays(np.float64, st.tuples(st.integers(1, 60), st.integers(1, 3)), elements=finite | few)


def magnitude(data: Array) -> Array:
    largest: Array = np.abs(data).max(axis=0)
    return largest


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(data=tables, share=arrays(np.float64, (20, 1), elements=st.floats(0, 1)))
def test_unnormalize_inverts_normalize_inside_the_range(
    kind: str, data: Array, share: Array
) -> None:
    normalizer = fit_normalizer(kind, data)
    low, high = data.min(axis=0), data.max(axis=0)
    inside = np.concatenate([data, np.clip(low + share * (high - low), low, high)])
    again = normalizer.unnormalize(normalizer.normalize(inside))
    rounding = 8 * np.finfo(np.float32).eps * magnitude(data)  # less than it counts as constant
    tolerance = np.where(high - low <= rounding, rounding, 4e-12 * magnitude(data))
    assert (np.abs(again - inside) <= tolerance + 1e-99).all()


@settings(deadline=None)
@given(
    data=arrays(np.float64, st.integers(2, 60), elements=st.integers(-500, 500).map(float)),
    z=arrays(np.float64, (20, 1), elements=st.floats(-1, 1)),
)
def test_normalize_inverts_unnormalize_on_the_cdf(data: Array, z: Array) -> None:
    normalizer = fit_normalizer("cdf", data[:, None])
    expected = z if data.min() < data.max() else 0 * z
    assert_allclose(normalizer.normalize(normalizer.unnormalize(z)), expected, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=30)
@given(data=tables)
def test_normalized_data_lies_in_the_clip_range_and_keeps_its_order(kind: str, data: Array) -> None:
    normalizer = fit_normalizer(kind, data)
    low, high = normalizer.clip_range
    z = normalizer.normalize(data)
    assert low.shape == high.shape == (data.shape[1],)
    assert (z >= low - 1e-12).all() and (z <= high + 1e-12).all()
    order = data.argsort(axis=0)
    assert (np.diff(np.take_along_axis(z, order, axis=0), axis=0) >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("constant", [0.0, 0.1, -3e7])
def test_constant_dimension_goes_to_zero_and_back(kind: str, constant: float) -> None:
    rng = np.random.default_rng(0)
    data = np.stack([rng.normal(size=1000), np.full(1000, constant)], axis=1)
    normalizer = fit_normalizer(kind, [data[:300], data[300:]])
    assert_array_equal(normalizer.normalize(data)[:, 1], 0.0)
    assert_array_equal(normalizer.normalize(data + 5)[:, 1], 0.0)
    assert_array_equal(normalizer.unnormalize(rng.normal(size=(50, 2)))[:, 1], constant)
    assert [bound[1] for bound in normalizer.clip_range] == [0, 0]
    assert normalizer.clip_range[1][0] > 0


@pytest.mark.fault("Data", "a dimension that varies by rounding only", "constant")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [5.0, -3e7])
def test_rounding_is_no_signal(kind: str, value: float) -> None:
    rng = np.random.default_rng(0)
    jitter = np.float32(value + 2e-8 * value * rng.uniform(-1, 1, 600))  # 1e-7 around 5
    rounded = value + np.spacing(np.float32(value)) * rng.integers(-1, 2, 600)
    data = np.stack([jitter, rounded, value + 2e-8 * rng.uniform(size=600) * value], axis=1)
    normalizer = fit_normalizer(kind, data)
    assert not normalizer.normalize(data)[:, :2].any()
    back = normalizer.unnormalize(rng.normal(size=(50, 3)))
    assert_allclose(back[:, :2], value, rtol=4e-7)
    assert np.abs(normalizer.normalize(data)[:, 2]).max() >= 0.9  # float64 holds finer signals


@pytest.mark.fault("Data", "a dead sensor with one glitch", "its rounding is no signal")
def test_rounding_beside_a_glitch_is_no_signal() -> None:
    data = np.float32(5) + np.float32(5e-7) * np.random.default_rng(0).integers(-1, 2, (600, 1))
    data = data.astype(np.float32)
    data[17] = 1e3
    z = np.delete(fit_normalizer("cdf", data).normalize(data), 17)
    assert np.ptp(z) < 1e-6


def test_minmax_reaches_both_ends_and_extrapolates_linearly() -> None:
    normalizer = fit_normalizer("minmax", np.array([[2.0], [4.0], [3.0]]))
    assert_allclose(normalizer.normalize(np.array([[2.0], [4.0], [5.0]])), [[-1], [1], [2]])
    assert_allclose(normalizer.unnormalize(np.array([-3.0])), [0.0])
    assert_array_equal(normalizer.clip_range, [[-1.0], [1.0]])


def test_gaussian_has_mean_zero_deviation_one_and_the_data_s_bounds() -> None:
    data = np.random.default_rng(1).normal([5, -2], [3, 0.1], (5000, 2))
    normalizer = fit_normalizer("gaussian", data)
    z = normalizer.normalize(data)
    assert_allclose(z.mean(axis=0), 0, atol=1e-12)
    assert_allclose(z.std(axis=0), 1)
    assert_allclose(np.stack(normalizer.clip_range), np.stack([z.min(axis=0), z.max(axis=0)]))
    assert normalizer.clip_range[1].min() > 3  # clipping x̂_0 to [-1, 1] would cut a third of it


def test_cdf_of_continuous_data_is_uniform() -> None:
    rng = np.random.default_rng(2)
    data = np.stack([rng.standard_cauchy(50_000), rng.exponential(size=50_000)], axis=1)
    z = np.sort(fit_normalizer("cdf", data).normalize(data), axis=0)
    uniform = np.linspace(-1, 1, 50_000)[:, None]
    assert np.abs(z - uniform).max() < 2 * 2 / (KNOTS - 1)
    fresh = fit_normalizer("cdf", data).normalize(rng.exponential(size=(50_000, 1)).repeat(2, 1))
    assert np.abs(np.sort(fresh[:, 1]) - uniform[:, 0]).max() < 0.02


def test_cdf_gives_ties_their_middle_rank() -> None:
    # ranks of the ties' middles: 1, 3, 7 -> -1, 2·2/6 - 1, 1
    data = np.array([0.0, 0, 1, 1, 5, 5, 5, 5, 5, 5])[:, None]
    z = fit_normalizer("cdf", data).normalize(np.array([[0.0], [1], [5], [3]]))
    assert_allclose(z[:, 0], [-1, -1 / 3, 1, 1 / 3])


def test_cdf_clips_outside_the_range() -> None:
    normalizer = fit_normalizer("cdf", np.array([[1.0], [2.0], [7.0]]))
    assert_array_equal(normalizer.normalize(np.array([[0.0], [8.0]])), [[-1], [1]])
    assert_array_equal(normalizer.unnormalize(np.array([[-1.5], [1.5]])), [[1], [7]])


def test_cdf_table_is_small_and_keeps_both_ends() -> None:
    data = np.random.default_rng(3).normal(size=(300_000, 1))
    normalizer = fit_normalizer("cdf", data)
    assert isinstance(normalizer, CdfNormalizer)
    assert 0.9 * KNOTS < len(normalizer.values) <= KNOTS
    assert normalizer.values[[0, -1]].tolist() == [data.min(), data.max()]
    assert np.diff(normalizer.levels).min() > 0.999 * 2 / (KNOTS - 1)


@pytest.mark.parametrize("kind", KINDS)
def test_fitting_in_pieces_equals_fitting_at_once(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(4)
    data = np.stack([rng.normal(size=9000), rng.integers(0, 5, 9000)], axis=1)
    whole = fit_normalizer(kind, data)
    monkeypatch.setattr(fitting, "_BUFFER", 1000)
    pieces = fit_normalizer(kind, iter(np.array_split(data, 31)))
    assert_allclose(pieces.normalize(data), whole.normalize(data), atol=1e-12)


def test_cdf_fitted_to_more_than_it_can_keep_stays_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "_BUFFER", 5_000)
    monkeypatch.setattr(fitting, "_SKETCH", 4_000)
    rng = np.random.default_rng(5)
    data = np.sort(rng.normal(size=(60_000, 1)), axis=0)  # the worst order: every piece is new
    data[20_000:40_000] = 0.0
    normalizer = fit_normalizer("cdf", np.array_split(data, 60))
    assert isinstance(normalizer, CdfNormalizer)
    assert normalizer.values[[0, -1]].tolist() == [data.min(), data.max()]
    rank = (np.arange(20_000) + 0.5) / 30_000 - 1
    assert np.abs(normalizer.normalize(data[:20_000])[:, 0] - rank).max() < 0.004
    assert abs(normalizer.normalize(np.zeros((1, 1))).item()) < 0.004


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_restore_the_same_map(kind: str) -> None:
    rng = np.random.default_rng(6)
    data = rng.normal(size=(4000, 3)) * [1, 0, 100]
    normalizer = fit_normalizer(kind, data)
    again = normalizer_from_arrays(kind, {k: v.copy() for k, v in normalizer.arrays().items()})
    assert (again.kind, again.size) == (kind, 3)
    x, z = rng.normal(size=(7, 5, 3)) * 200, rng.normal(size=(7, 5, 3))
    assert_array_equal(again.normalize(x), normalizer.normalize(x))
    assert_array_equal(again.unnormalize(z), normalizer.unnormalize(z))
    assert_array_equal(again.clip_range, normalizer.clip_range)
    assert all(array.dtype in (np.float64, np.int64) for array in again.arrays().values())


@pytest.mark.parametrize("kind", KINDS)
def test_every_batch_shape_and_precision_gives_the_same(kind: str) -> None:
    data = np.random.default_rng(7).normal(size=(500, 2))
    normalizer = fit_normalizer(kind, data)
    x = data[:24].astype(np.float32)
    flat = normalizer.normalize(x)
    assert flat.dtype == np.float64
    assert_array_equal(normalizer.normalize(x.reshape(4, 3, 2, 2)).reshape(24, 2), flat)
    assert_array_equal(np.stack([normalizer.normalize(row) for row in x]), flat)
    assert normalizer.normalize(np.empty((0, 2))).shape == (0, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_immutable(kind: str) -> None:
    data = np.random.default_rng(8).normal(size=(50, 1))
    normalizer = fit_normalizer(kind, data)
    for array in normalizer.arrays().values():
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    data[:] = 0  # the caller's array is not part of it
    assert normalizer.normalize(np.array([2.0])).item() > 0.5


def test_unknown_kind_suggests_the_known_one() -> None:
    with pytest.raises(ConfigError, match=r"'minmx'.*Did you mean 'minmax'\?"):
        fit_normalizer("minmx", np.ones((2, 1)))
    with pytest.raises(ConfigError, match="normalizer kind: expected one of cdf, gaussian, minmax"):
        normalizer_from_arrays("quantile", {})


@pytest.mark.fault("Data", "normalisers of data that are empty, NaN or of another shape", "refused")
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.ones(3), r"expected shape \(M >= 1, d\), got \(3,\)"),
        (np.ones((0, 2)), r"got \(0, 2\)"),
        (np.array([[1.0], [np.nan]]), r"finite values, got row 1: \[nan\]"),
        (np.array([[1e101]]), "expected finite values"),
        ([], "at least one row"),
        ([np.ones((2, 2)), np.ones((2, 3))], r"expected shape \(M >= 1, 2\), got \(2, 3\)"),
    ],
)
def test_bad_data_is_refused(data: Array | list[Array], message: str) -> None:
    for kind in KINDS:
        with pytest.raises(InputError, match=message):
            fit_normalizer(kind, data)


def test_wrong_last_axis_is_refused() -> None:
    for kind in KINDS:
        normalizer = fit_normalizer(kind, np.random.default_rng(9).normal(size=(10, 2)))
        for call in (normalizer.normalize, normalizer.unnormalize):
            for shape in ((3,), (5, 1), ()):
                with pytest.raises(InputError, match=r"expected an array \[\.\.\., 2\]"):
                    call(np.zeros(shape))


def affine(**changed: Array) -> dict[str, Array]:
    one = np.ones(2)
    return {"shift": one * 0, "scale": one, "low": -one, "high": one, **changed}


def cdf(**changed: Array) -> dict[str, Array]:
    return {
        "values": np.array([0.0, 1, 3, 7]),
        "levels": np.array([-1.0, 0, 1, 0]),
        "counts": np.array([3, 1]),
        **changed,
    }


@pytest.mark.fault("Files", "damaged normaliser tables", "refused")
@pytest.mark.parametrize(
    ("kind", "arrays", "message"),
    [
        ("minmax", affine(shift=np.array([0, np.nan])), "finite vectors"),
        ("minmax", affine(scale=np.ones(3)), "of one length"),
        ("gaussian", affine(scale=np.array([1.0, -1])), "negative"),
        ("gaussian", affine(high=np.array([1.0, -3])), "negative"),
        ("minmax", cdf(), r"expected arrays \['high', 'low', 'scale', 'shift'\]"),
        ("cdf", affine(), r"expected arrays \['counts', 'levels', 'values'\]"),
        ("cdf", cdf(values=np.array([0.0, 3, 1, 7])), "dimension 0 do not increase"),
        ("cdf", cdf(levels=np.array([-1.0, -1, 1, 0])), "dimension 0 do not increase"),
        ("cdf", cdf(levels=np.array([-1.0, 0, 0.5, 0])), "go from -1.0 to 0.5"),
        ("cdf", cdf(levels=np.array([-1.0, 0, 1, 1])), "dimension 1 go from 1.0"),
        ("cdf", cdf(counts=np.array([3, 2])), "one for each counted knot"),
        ("cdf", cdf(counts=np.array([4, 0])), "one for each counted knot"),
        ("cdf", cdf(counts=np.array([3.0, 1.0])), "one for each counted knot"),
        ("cdf", cdf(values=np.array([0.0, 1, np.inf, 7])), "finite"),
    ],
)
def test_damaged_arrays_are_refused(kind: str, arrays: dict[str, Array], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        normalizer_from_arrays(kind, arrays)


def test_sound_arrays_are_taken() -> None:
    assert isinstance(normalizer_from_arrays("gaussian", affine()), AffineNormalizer)
    assert normalizer_from_arrays("cdf", cdf()).unnormalize(np.array([0.5, 9.0])).tolist() == [2, 7]


@pytest.mark.fault(
    "Data", "data that the caller changes after fitting", "the normaliser does not see it"
)
@pytest.mark.parametrize("kind", KINDS)
def test_fitter_keeps_no_reference_to_the_caller_s_array(kind: str) -> None:
    fitter, data = NormalizerFitter(kind), np.array([[1.0], [2.0]])
    for first in (1.0, 5.0):  # a buffer that is used again
        data[:, 0] = first, first + 1
        fitter.add(data)
    ends = fitter.fit().normalize(np.array([[1.0], [6.0]]))
    assert_allclose(ends[0], -ends[1])
    assert ends[1] > 0.5


def test_fitter_tells_whether_it_is_empty() -> None:
    fitter = NormalizerFitter("cdf")
    assert fitter.empty
    fitter.add(np.ones((1, 1)))
    assert not fitter.empty


@pytest.mark.parametrize("kind", KINDS)
def test_one_observation_takes_microseconds(kind: str) -> None:
    normalizer = fit_normalizer(kind, np.random.default_rng(10).normal(size=(5000, 5)))
    x = np.zeros(5)
    seconds = []
    for _ in range(200):
        start = time.perf_counter()
        normalizer.normalize(x)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1e-4  # measured: 2 µs affine, 8 µs CDF
