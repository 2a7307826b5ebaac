"""Statistics of evaluated pictures, from their features and rewards alone: diversity, drift, and 95 % intervals.

Features are [n, F], a row a picture (rewards/judges.py). Rows with a NaN, of bad pictures, are left out. Prompts are
fixed, noise is what varies: pictures are told apart, split and left out within their prompts (`strata`), so that what
prompts differ by widens no interval. Every draw has a fixed seed. docs/evaluation.md has how often each interval holds
the truth, tests/evaluation/test_coverage.py measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

SPLITS = 100  # random halves of the pictures for an interval, and twice as many for a floor
LEVEL = 0.95  # of every interval, and of a floor's upper end
NONE = float("nan")
Interval = tuple[float, float]
Prompts = Sequence[str]


def mean_of_good(values: np.ndarray) -> float:
    """Mean of the values [n] that are not NaN; NaN where none is."""
    good = values[~np.isnan(values)]
    return float(good.mean()) if len(good) else NONE


def mean_interval(values: np.ndarray, prompts: Prompts) -> Interval:
    """Interval (low, high) of the mean of `values` [n], NaN left out: Wilson's where all are 0 or 1, else Student's
    with Hall's correction for skewness. (NaN, NaN) of fewer than two values."""
    good = values[kept := ~np.isnan(values)]
    if len(good) > 1 and _is_share(good):
        from scipy.stats import binomtest  # it takes a second

        share = binomtest(int(good.sum()), len(good)).proportion_ci(LEVEL, "wilson")
        return float(share.low), float(share.high)
    return student_interval(good, strata(prompts, kept))


def paired_interval(before: np.ndarray, after: np.ndarray, prompts: Prompts) -> Interval:
    """As `mean_interval`, of after - before over the same pictures; of two shares Bonett and Price's (2012): one change
    for the better and one for the worse are added, so that no interval is a point where nothing was seen to change."""
    change = (after - before)[kept := ~np.isnan(after - before)]
    if len(change) > 1 and _is_share(before[kept]) and _is_share(after[kept]):
        more = np.append(change, (1.0, -1.0))
        reach = _t(np.inf) * more.std() / np.sqrt(len(more))
        return max(-1.0, float(more.mean() - reach)), min(1.0, float(more.mean() + reach))
    return student_interval(change, strata(prompts, kept))


def strata(prompts: Prompts, kept: np.ndarray) -> np.ndarray:
    """Numbers of the groups, 0 to G - 1, that the kept pictures belong to: their prompts, but those of which a single
    picture is kept are one group."""
    groups = _numbers(np.asarray(prompts, object)[kept])
    return _numbers(np.where(np.bincount(groups)[groups] > 1, groups, -1)) if len(groups) else groups


def _numbers(labels: Sequence[str] | np.ndarray) -> np.ndarray:
    return np.unique(np.asarray(labels, object), return_inverse=True)[1]


def _is_share(values: np.ndarray) -> bool:
    return bool(np.isin(values, (0, 1)).all())


def _t(freedom: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + LEVEL) / 2))


def student_interval(values: np.ndarray, groups: np.ndarray) -> Interval:
    """Of the mean of `values` [n], drawn independently within each of `groups` [n] of fixed sizes: Student's interval,
    its T transformed so that skewness is gone (Hall 1992, On the removal of skewness by transformation)."""
    n, sizes = len(values), np.bincount(groups)
    if (freedom := n - len(sizes)) < 1:
        return NONE, NONE
    apart = values - (np.bincount(groups, values) / sizes)[groups]
    error = float(np.sqrt((apart**2).sum() / (n * freedom)))
    mean, t = float(values.mean()), _t(freedom)
    if error <= 1e-12 * abs(mean):
        return mean, mean
    told = ((sizes - 1) * (sizes - 2) / sizes).sum()  # of n that tell of skewness: pairs do not
    skew = float((apart**3).sum() / told / n**2 / error**3) if told else 0.0  # of the mean itself
    skew = float(np.clip(skew, -0.8 / t, 0.8 / t))  # of few values it is hardly known, and the ends would be anywhere

    def untransformed(y: float) -> float:
        return float(3 * (np.cbrt(1 + skew * (y - skew / 6)) - 1) / skew) if abs(skew) > 1e-6 else y

    return mean - error * untransformed(t), mean - error * untransformed(-t)


def vendi(features: np.ndarray) -> float:
    """Vendi score (arXiv 2210.02410) with the cosine kernel, the effective number of different pictures, 1 to n: exp of
    the entropy of the eigenvalues of K / n, K [n, n] the cosines. NaN without pictures."""
    unit = _unit(_good(features))
    return _vendi(_products(unit) / len(unit)) if len(unit) else NONE


def _products(unit: np.ndarray) -> np.ndarray:
    """K, or the smaller matrix that has the same eigenvalues but zeros."""
    return unit.T @ unit if len(unit) > unit.shape[1] else unit @ unit.T


def _vendi(matrix: np.ndarray) -> float:
    values = np.linalg.eigvalsh(matrix)
    values = values[values > 1e-12]
    return float(np.exp(-(values * np.log(values)).sum()))


def vendi_interval(features: np.ndarray, prompts: Prompts) -> Interval:
    """By the jackknife, on the scale of its logarithm: how the score of all pictures but one differs by which is left
    out. Not by the bootstrap: a picture drawn twice looks like a lack of diversity. (NaN, NaN) of fewer than three."""
    kept = ~np.isnan(features).any(1)
    unit, groups = _unit(features[kept]), strata(prompts, kept)
    if (n := len(unit)) < 3:
        return NONE, NONE
    left = -(n - 1) * np.log([_vendi(_products(np.delete(unit, i, 0)) / (n - 1)) for i in range(n)])
    low, high = np.exp(np.array(student_interval(left, groups)) - left.mean()) * _vendi(_products(unit) / n)
    return max(1.0, float(low)), min(float(n), float(high))


def distance(
    features: np.ndarray, prompts: Sequence[str], before: np.ndarray | None = None
) -> tuple[float, float, float]:
    """Mean cosine distance, 0 to 2, of a picture to the others of its prompt, and its interval (value, low, high); or,
    given the same pictures `before`, of its change. NaN where no prompt has two good pictures; and an interval of which
    nothing is known.

    A picture is in many pairs, so pairs are not independent: within a prompt of m pictures the variance of their mean
    U is U^2 less the mean product of two pairs without a common picture, which is unbiased. That takes four pictures;
    where a prompt has fewer, the prompts themselves are the sample.
    """
    good, groups = ~np.isnan(features if before is None else features + before).any(1), _numbers(prompts)
    means, variances, sizes = [], [], []
    for rows in (np.flatnonzero(good & (groups == group)) for group in range(groups.max(initial=-1) + 1)):
        if (m := len(rows)) < 2:
            continue
        apart = _apart(features[rows]) - (0.0 if before is None else _apart(before[rows]))
        total, squares, pairs = apart.sum() / 2, (apart**2).sum() / 2, m * (m - 1) / 2
        if m >= 4:
            disjoint = (total**2 + squares - (apart.sum(1) ** 2).sum()) / (pairs * (m - 2) * (m - 3) / 2)
            independent = (squares / pairs - (total / pairs) ** 2) / pairs  # at least that
            variances.append(max((total / pairs) ** 2 - disjoint, independent))
        means.append(total / pairs)
        sizes.append(m)
    if not means:
        return NONE, NONE, NONE
    weights = np.array(sizes) / sum(sizes)
    value, freedom = float(weights @ means), sum(sizes) - len(sizes)
    if len(variances) == len(means):
        variance = float(weights**2 @ variances)
    elif freedom := len(means) - 1:
        variance = float(weights**2 @ (np.array(means) - value) ** 2 * len(means) / freedom)
    else:
        return value, NONE, NONE
    reach = _t(freedom) * np.sqrt(variance)
    least, most = (0.0, 2.0) if before is None else (-2.0, 2.0)
    return value, max(least, value - reach), min(most, value + reach)


def fid(features: np.ndarray, reference: np.ndarray) -> float:
    """Frechet distance (arXiv 1706.08500) of two sets of pictures: 0 for equal means and covariances; its bias grows as
    n shrinks, so it is compared only between sets of one size. NaN of fewer than two pictures on a side."""
    sets = [_good(rows).astype(np.float64) for rows in (features, reference)]
    if min(map(len, sets)) < 2:
        return NONE
    (mean, a), (mean_of_reference, b) = ((rows.mean(0), rows - rows.mean(0)) for rows in sets)
    # Covariances are a'a and b'b. Of many pictures a triangle R with R'R = a'a does as well, and is small.
    a, b = (rows / np.sqrt(len(rows) - 1) for rows in (a, b))
    a, b = (np.asarray(np.linalg.qr(rows, "r")) if len(rows) > rows.shape[1] else rows for rows in (a, b))
    root = np.linalg.norm(a @ b.T, "nuc")  # the trace of (a'a b'b)^1/2 is the sum of the singular values of ab'
    squares = ((mean - mean_of_reference) ** 2).sum() + (a**2).sum() + (b**2).sum()
    return max(0.0, float(squares - 2 * root))  # no rounding error is a distance


def kid(features: np.ndarray, reference: np.ndarray) -> float:
    """Kernel distance (squared MMD, cubic kernel, arXiv 1801.01401) of two sets: unbiased for pictures of one prompt,
    so it may be below 0. NaN of fewer than two pictures on a side."""
    sets = [_good(rows).astype(np.float64) for rows in (features, reference)]
    if min(map(len, sets)) < 2:
        return NONE
    (own, across), (_, other) = [[(x @ y.T / x.shape[1] + 1) ** 3 for y in sets] for x in sets]
    within = sum((kernel.sum() - kernel.trace()) / (len(kernel) * (len(kernel) - 1)) for kernel in (own, other))
    return float(within - 2 * across.mean())


def drift_interval(
    drift: Callable[[np.ndarray, np.ndarray], float], features: np.ndarray, reference: np.ndarray, prompts: Prompts,
) -> Interval:  # fmt: skip
    """Interval of `fid` or `kid` of two sets of the same prompts at different noise: what it would be at other noise,
    for sets of this size. (NaN, NaN) where a half has fewer than two pictures.

    Both sets are split into halves, again and again. Two halves have no picture in common, so they are independent, and
    the covariance of their distances over the splits is minus the variance of the distance, whatever its order in the
    pictures. (Half-samples alone, or a bootstrap, count three times what two pictures do together.) The interval is
    that of the logarithm of how far the distance is above the least it can be, which it therefore never reaches.
    """
    value, rng = drift(features, reference), np.random.default_rng(0)
    kept = [~np.isnan(rows).any(1) for rows in (features, reference)]
    sets = [(rows[good], strata(prompts, good)) for rows, good in zip((features, reference), kept, strict=True)]
    splits = []
    for _ in range(SPLITS):
        halves = [_split(groups, rng) for _, groups in sets]
        splits.append([drift(*(rows[half[i]] for (rows, _), half in zip(sets, halves, strict=True))) for i in (0, 1)])
    apart, together = np.diff(splits)[:, 0] / 2, np.mean(splits, 1)
    own, shared = (apart**2).mean(), together.var(ddof=1)  # their difference is minus the covariance,
    variance = max(own - shared, (own + 2 * shared) / 4)  # and it is neither below half of the one nor below the other
    used = sum(len(half) for half in halves[0]) / len(sets[0][0])  # odd pictures are in neither half
    above = value - (0.0 if drift is fid else _least_kid(*(rows for rows, _ in sets)))
    if not above > 0:  # sets that are the same, or none
        return value, value
    freedom = max(1, len(sets[0][0]) - int(sets[0][1].max()) - 1)
    factor = np.exp(min(_t(freedom) * float(np.sqrt(used * variance)) / above, 100))
    return value - above + above / factor, value - above + above * factor


def _least_kid(*sets: np.ndarray) -> float:
    """What `kid` would be of sets that look the same to the kernel: there the biased distance is 0."""
    kernels = [(rows.astype(np.float64) @ rows.T / rows.shape[1] + 1) ** 3 for rows in sets]
    return sum(
        float((kernel.sum() - kernel.trace()) / (len(kernel) * (len(kernel) - 1)) - kernel.mean()) for kernel in kernels
    )


def floor(
    difference: Callable[[np.ndarray, np.ndarray], float], base: np.ndarray, other: np.ndarray, prompts: Prompts
) -> Interval:
    """What noise alone makes of `difference` of two sets: its median and upper end (LEVEL) over random splits, within
    prompts, of the pictures or values [n, ...] of two sets of the same model and prompts at different noise."""
    pool, rng = np.concatenate([base, other]), np.random.default_rng(0)
    kept = ~np.isnan(pool).any(1) if pool.ndim > 1 else ~np.isnan(pool)
    pool, groups = pool[kept], _numbers(np.tile(np.asarray(prompts, object), 2)[kept])
    halves = (_split(groups, rng) for _ in range(2 * SPLITS))
    drawn = np.array([difference(pool[one], pool[two]) for one, two in halves])
    most = np.quantile(drawn, LEVEL * (len(drawn) + 1) / len(drawn), method="higher")  # that a further one stays below
    return float(np.median(drawn)), float(most)


def _split(groups: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Places [h] of two random halves of each group; of one with an odd number, one is in neither."""
    order = rng.permutation(len(groups))
    order = order[np.argsort(groups[order], kind="stable")]
    sizes = np.bincount(groups)
    place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # within its group
    inside = place < np.repeat(sizes // 2 * 2, sizes)
    return order[inside & (place % 2 == 0)], order[inside & (place % 2 == 1)]


def _good(features: np.ndarray) -> np.ndarray:
    return features[~np.isnan(features).any(1)]


def _apart(features: np.ndarray) -> np.ndarray:
    """Cosine distances [n, n], 0 on the diagonal."""
    unit = _unit(features)
    distances = 1 - unit @ unit.T
    np.fill_diagonal(distances, 0.0)
    return np.asarray(distances)


def _unit(features: np.ndarray) -> np.ndarray:
    """Rows of length 1, in float64."""
    rows = features.astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
