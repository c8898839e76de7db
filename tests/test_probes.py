"""The probes against scikit-learn's, and against the mistakes that move a published figure."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from bagssl import devices, evaluation, intervals, probes
from bagssl.errors import InputError

CLASSES = 5


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For hundreds of small products a second thread is only something to wait for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(threads)


def features(count: int, seed: int, dim: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping classes with correlated features of very different sizes, as an encoder's are."""
    world = torch.Generator().manual_seed(0)
    centres, mix = torch.randn(CLASSES, dim, generator=world), torch.randn(dim, dim, generator=world)
    sizes = 10 ** torch.linspace(-2, 1, dim)
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=draw)
    return (centres[labels] * 0.6 + torch.randn(count, dim, generator=draw)) @ mix * sizes + sizes, labels


TRAIN, TEST = features(700, 1), features(300, 2)


def cosine_neighbours(k: int, temperature: float, metric: str = "cosine") -> np.ndarray:
    vote = KNeighborsClassifier(
        k, metric=metric, algorithm="brute", weights=lambda d: np.exp((1 - d) / temperature)
    )
    return vote.fit(*(part.numpy() for part in TRAIN)).predict(TEST[0].numpy())


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (20, 0.1), (200, 0.1), (200, 0.07), (700, 0.02)])
def test_knn_predicts_what_scikit_learn_predicts(k, temperature):
    ours = probes.knn(*TRAIN, *TEST, k=k, temperature=temperature)
    assert np.array_equal(ours.predicted.numpy(), cosine_neighbours(k, temperature))


def many_classes(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Twenty classes that overlap; of the last one the first hundred images have none."""
    centres = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(20, (count,), generator=draw)
    return centres[labels] + torch.randn(count, 6, generator=draw), labels


def test_top_5_is_scikit_learns_and_an_unseen_class_is_never_in_it():
    train, test = many_classes(600, 1), many_classes(400, 2)
    found = probes.linear(*train, *test, regularisations=[1e-3])
    logits = probes.fit_linear(*train, regularisations=[1e-3]).logits(test[0])
    expected = 100 * top_k_accuracy_score(test[1], logits, k=5, labels=range(20))
    assert found.top5.value == pytest.approx(expected) and found.value < expected < 100
    assert found.top5[1:] == intervals.proportion(np.arange(400) < round(4 * expected))[1:]
    seen = train[1] != 19
    without = probes.linear(train[0][seen], train[1][seen], *test, regularisations=[1e-3])
    own = probes.linear(train[0][seen], train[1][seen], test[0][test[1] == 19], test[1][test[1] == 19])
    assert without.top5.value < found.top5.value and own.top5.value == own.value == 0
    two = train[1] < 2  # with so few, every class is among five
    few = probes.linear(train[0][two], train[1][two], test[0], test[1], regularisations=[1e-3])
    assert few.top5.value == pytest.approx(100 * (test[1] < 2).double().mean().item())


def test_top_5_of_knn_counts_a_class_without_votes_as_wrong():
    train, test = many_classes(600, 1), many_classes(400, 2)
    found = probes.knn(*train, *test, k=3)  # at most three classes have votes: the others share a score of zero
    nearest = KNeighborsClassifier(3, metric="cosine", algorithm="brute").fit(*map(np.asarray, train))
    near = train[1].numpy()[nearest.kneighbors(test[0].numpy())[1]]
    assert found.top5.value == pytest.approx(100 * (near == test[1].numpy()[:, None]).any(axis=1).mean())
    assert found.top5.value > found.value


def test_knn_is_neither_euclidean_nor_of_another_temperature():
    ours = probes.knn(*TRAIN, *TEST).predicted.numpy()
    assert not np.array_equal(ours, cosine_neighbours(200, 0.1, metric="euclidean"))
    assert not np.array_equal(ours, cosine_neighbours(200, 0.02))


def test_knn_sees_directions_only_and_clips_k():
    ours = probes.knn(*TRAIN, *TEST, k=5000, temperature=1e-3)  # exp(1 / T) alone would overflow
    lengths = torch.rand(len(TRAIN[0]), 1, generator=torch.Generator().manual_seed(3)) + 0.5
    assert ours.settings["k"] == 700
    assert torch.equal(
        ours.predicted, probes.knn(TRAIN[0] * lengths, *TRAIN[1:], *TEST, k=700, temperature=1e-3).predicted
    )
    itself = probes.knn(*TRAIN, *TRAIN, k=1)
    assert itself.value == itself.low == itself.high == 100


def test_knn_does_not_depend_on_how_the_test_set_is_cut():
    whole = probes.knn(*TRAIN, *TEST).predicted
    single = [probes.knn(*TRAIN, TEST[0][i : i + 1], TEST[1][i : i + 1]).predicted for i in range(40)]
    assert torch.equal(whole[:40], torch.cat(single))


def probabilities(strength: float) -> torch.Tensor:
    _, weights, last = probes._fit(lambda: [TRAIN[0].double()], TRAIN[1], CLASSES, strength, None, 1e-6)
    assert last["gradient"] < 1e-6
    return probes._logits(TEST[0].double(), weights).softmax(dim=1)


@pytest.mark.parametrize("block", [7, 64, 699, 5000])
def test_linear_in_blocks_is_linear_on_all_at_once(block):
    x, y = TRAIN[0].double(), TRAIN[1]
    whole, cut = probes.fit_linear(*TRAIN), probes.fit_linear(*TRAIN, block=block)
    for name in ("regularisation", "grid", "held_out_accuracy", "at_end"):
        assert cut.settings[name] == whole.settings[name]
    torch.testing.assert_close(cut.centre, whole.centre, rtol=1e-12, atol=0)
    torch.testing.assert_close(cut.logits(TEST[0]), whole.logits(TEST[0]), rtol=1e-4, atol=1e-4)
    mean, scale = probes._standard(lambda: [x])
    torch.testing.assert_close(probes._standard(lambda: x.split(block)), (mean, scale), rtol=1e-12, atol=1e-14)
    # where the descent ends the same gradient is left, to rounding; negative control: without one image it is another
    _, last = probes._solver(lambda: [(x - mean) / scale], y, CLASSES, None)(1e-2, None, 1e-7)
    solve = probes._solver(lambda: ((part - mean) / scale for part in x.split(block)), y, CLASSES, block)
    weights, ended = solve(1e-2, None, 1e-7)
    assert max(last["gradient"], ended["gradient"]) < 1e-7
    standard = (x - mean) / scale
    residual = probes._logits(standard, weights).softmax(dim=1) - torch.eye(CLASSES)[y].double()
    assert left(residual.T @ standard, weights) < 1e-6
    assert left(residual[1:].T @ standard[1:], weights) > 1e-4


def left(total: torch.Tensor, weights: torch.Tensor) -> float:
    return float((total / len(TRAIN[0]) + 1e-2 * weights[:, :-1]).abs().max())


def test_features_that_do_not_fit_a_device_are_probed_there_in_blocks(monkeypatch):
    """As `evaluation` asks for it; a device that is no CPU stands for one of too little memory."""
    asked, linear = [], probes.linear
    monkeypatch.setitem(evaluation.PROBES, "linear", lambda *x, **how: asked.append(how) or linear(*x, **how))
    for fits in (True, False):
        monkeypatch.setattr(evaluation, "fits", lambda *_, fits=fits: fits)
        for name in ("knn", "linear"):
            found = evaluation._probe(name, *TRAIN, *TEST, device="cpu")
            assert torch.equal(found.predicted, getattr(probes, name)(*TRAIN, *TEST).predicted)
    assert asked == [{}, {"device": "cpu", "block": probes.BLOCK}]


def test_what_fits_is_judged_by_what_a_probe_makes_of_it(monkeypatch):
    features, labels, cuda = torch.empty(1000, 50), torch.arange(1000) % 10, torch.device("cuda")
    seen = []
    monkeypatch.setattr(probes, "room", lambda nbytes, device: seen.append(nbytes))
    for name in ("knn", "linear"):
        probes.fits(name, features, labels, cuda)
    assert seen == [3 * features.nbytes, 8 * features.nbytes + 3 * 1000 * 10 * 8]
    assert devices.room(2**60, torch.device("cpu"))
    for name, value in {"mem_get_info": (100, 900), "memory_reserved": 70, "memory_allocated": 30}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert devices.room(140, cuda) and not devices.room(141, cuda)


def reference(strength: float, standardise: bool = True) -> tuple[np.ndarray, np.ndarray]:
    scale = StandardScaler(with_mean=standardise, with_std=standardise).fit(TRAIN[0].double().numpy())
    model = LogisticRegression(
        C=1 / (strength * len(TRAIN[0])), tol=1e-7, max_iter=1000 if standardise else 100
    )
    model.fit(scale.transform(TRAIN[0].double().numpy()), TRAIN[1].numpy())
    x = scale.transform(TEST[0].double().numpy())
    return model.predict_proba(x), model.predict(x)


@pytest.mark.parametrize("strength", [1e-1, 1e-2, 1e-3, 1e-5])
def test_linear_is_the_logistic_regression_of_scikit_learn(strength):
    expected, predicted = reference(strength)
    assert np.abs(probabilities(strength).numpy() - expected).max() < 1e-3
    ours = probes.linear(*TRAIN, *TEST, regularisations=[strength])
    assert np.array_equal(ours.predicted.numpy(), predicted)
    assert ours.value == pytest.approx(100 * (predicted == TEST[1].numpy()).mean())


def test_standardising_matters():
    with warnings.catch_warnings(action="ignore"):  # nor does it converge in time
        expected, _ = reference(1e-1, standardise=False)
    assert np.abs(probabilities(1e-1).numpy() - expected).max() > 0.05


def test_linear_does_not_depend_on_the_units_of_a_feature():
    units = 10 ** torch.linspace(-3, 3, TRAIN[0].shape[1])
    plain = probes.linear(*TRAIN, *TEST)
    scaled = probes.linear(TRAIN[0] * units + 5 * units, TRAIN[1], TEST[0] * units + 5 * units, TEST[1])
    assert (plain.predicted == scaled.predicted).float().mean() > 0.99
    assert plain.settings["regularisation"] == scaled.settings["regularisation"]


def test_dead_and_doubled_features_do_no_harm():
    def widen(x):
        return torch.cat([x, x[:, :2], torch.full((len(x), 1), 0.1), torch.zeros(len(x), 1)], dim=1)

    ours = probes.linear(widen(TRAIN[0]), TRAIN[1], widen(TEST[0]), TEST[1])
    assert abs(ours.value - probes.linear(*TRAIN, *TEST).value) < 2


def test_held_out_images_are_a_tenth_of_each_class_and_nothing_is_fitted_to_them():
    mask = probes._held_out(TRAIN[1], 0.1, seed=0)
    for label in range(CLASSES):
        assert mask[TRAIN[1] == label].sum() == round(0.1 * int((TRAIN[1] == label).sum()))
    assert torch.equal(mask, probes._held_out(TRAIN[1], 0.1, seed=0))
    assert not torch.equal(mask, probes._held_out(TRAIN[1], 0.1, seed=1))

    # held-out images of another size, so that their statistics would be seen; fitted to the others alone
    x = torch.where(mask[:, None], TRAIN[0] * 20, TRAIN[0])
    ours = probes._choose(lambda: [x[~mask]], lambda: [x[mask]], TRAIN[1], CLASSES, mask, [1e-1])[2][1e-1]
    fitted, judged = (part.numpy() for part in (x[~mask], x[mask]))
    scale = StandardScaler().fit(fitted)
    model = LogisticRegression(C=1 / (1e-1 * len(fitted)), tol=1e-7, max_iter=1000)
    model.fit(scale.transform(fitted), TRAIN[1][~mask].numpy())
    assert ours == pytest.approx(100 * model.score(scale.transform(judged), TRAIN[1][mask].numpy()))


def test_of_equal_strengths_the_strongest_is_chosen_and_the_grid_grows_where_the_best_is_at_its_end():
    grid = sorted(probes.linear(*TRAIN, *TEST).settings["grid"])
    assert set(probes.STRENGTHS) <= set(grid)
    easy = torch.eye(CLASSES).repeat(40, 1)
    labels = torch.arange(CLASSES).repeat(40)
    tied = probes.linear(easy, labels, easy, labels, regularisations=[1e-2, 1e-3])
    assert tied.settings["held_out_accuracy"] == [100.0] * len(tied.settings["grid"])
    assert tied.settings["regularisation"] == max(tied.settings["grid"]) == pytest.approx(10)
    assert tied.settings["at_end"]
    inner = probes.linear(*TRAIN, *TEST, regularisations=[100, 10])
    assert min(inner.settings["grid"]) < 10 and inner.settings["regularisation"] < 10


@pytest.mark.parametrize("probe", [probes.knn, probes.linear])
def test_test_labels_change_the_score_and_nothing_else(probe):
    honest = probe(*TRAIN, *TEST)
    shuffled = probe(
        *TRAIN, TEST[0], TEST[1][torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    )
    assert torch.equal(honest.predicted, shuffled.predicted) and honest.settings == shuffled.settings
    assert honest.value > shuffled.value + 20


@pytest.mark.parametrize("probe", [probes.knn, probes.linear])
def test_shuffled_training_labels_give_chance(probe):
    order = torch.randperm(700, generator=torch.Generator().manual_seed(0))
    chance = probe(TRAIN[0], TRAIN[1][order], *TEST)
    assert abs(chance.value - 100 / CLASSES) < 10 < probe(*TRAIN, *TEST).value - 100 / CLASSES


@pytest.mark.parametrize("probe", [probes.knn, probes.linear])
def test_labels_may_have_any_names_and_features_any_precision(probe):
    plain = probe(*TRAIN, *TEST)
    renamed = probe(TRAIN[0].double(), 7 * TRAIN[1] - 3, TEST[0].double(), 7 * TEST[1] - 3)
    assert renamed.value == plain.value and torch.equal(renamed.predicted, 7 * plain.predicted - 3)


def test_an_accuracy_is_the_share_of_right_answers():
    ours = probes.linear(*TRAIN, *TEST)
    assert torch.equal(ours.correct, ours.predicted == TEST[1])
    assert (ours.value, ours.low, ours.high) == intervals.proportion(ours.correct.numpy())
    assert ours.low < ours.value < ours.high and ours.value == pytest.approx(100 * ours.correct.double().mean().item())


def with_value(x: torch.Tensor, value: float) -> torch.Tensor:
    return x.index_put((torch.tensor([3]), torch.tensor([0])), torch.tensor(value))


@pytest.mark.parametrize("probe", [probes.knn, probes.linear])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (with_value(TRAIN[0], float("nan")), TRAIN[1], *TEST),
            InputError,
            "1 of 700 training images have NaN",
        ),
        ((*TRAIN, with_value(TEST[0], float("inf")), TEST[1]), InputError, "1 of 300 test images have NaN"),
        ((TRAIN[0], TRAIN[1] * 0, *TEST), InputError, "all of one class"),
        ((TRAIN[0][:0], TRAIN[1][:0], *TEST), InputError, "no training features"),
        ((*TRAIN, TEST[0][:0], TEST[1][:0]), InputError, "no test features"),
        ((TRAIN[0][:9], TRAIN[1], *TEST), ValueError, r"integers \[images\]"),
        ((TRAIN[0], TRAIN[1].float(), *TEST), ValueError, r"integers \[images\]"),
        ((*TRAIN, TEST[0][:, :5], TEST[1]), ValueError, "12 dimensions and test features 5"),
    ],
)
def test_senseless_features_are_named(probe, arguments, error, message):
    with pytest.raises(error, match=message):
        probe(*arguments)


@pytest.mark.parametrize(
    ("probe", "options"),
    [
        (probes.knn, {"k": 0}),
        (probes.knn, {"temperature": 0}),
        (probes.linear, {"regularisations": []}),
        (probes.linear, {"regularisations": [0.1, 0]}),
        (probes.linear, {"regularisations": [float("nan"), 1]}),
        (probes.linear, {"held_out": 1}),
    ],
)
def test_senseless_options_are_refused(probe, options):
    with pytest.raises(ValueError):
        probe(*TRAIN, *TEST, **options)


def test_one_image_of_each_class_leaves_nothing_to_hold_out():
    x, y = torch.eye(3), torch.arange(3)
    with pytest.raises(InputError, match="two training images"):
        probes.linear(x, y, x, y)
    assert probes.linear(x, y, x, y, regularisations=[1e-3]).value == 100
