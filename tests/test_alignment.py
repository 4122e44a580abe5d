"""Which part of a state goes on in which part of another's, and what is said of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from came_optax import (
    BalancedSplit,
    ConversionReport,
    came,
    conversion_report,
    convert_state,
    quantized_ema,
    steady_came,
)

pytestmark = pytest.mark.usefixtures("promotion")


SCHEDULE = optax.linear_schedule(0.0, 1e-2, 100)
PARAMS = {"embed": jnp.full((96, 8), 0.1), "kernel": jnp.ones((64, 64))}


def after(tx, steps, params=PARAMS):
    """Returns the state after as many steps of a gradient that stays the same."""
    state = tx.init(params)
    for _ in range(steps):
        _, state = tx.update(params, state, params)
    return state


def converted(old, new, steps=6, **kwargs):
    state = after(old, steps)
    return state, convert_state(state, PARAMS, old=old, new=new, **kwargs)


inject = optax.inject_hyperparams


PARTED = {"a": steady_came(SCHEDULE), "b": came(SCHEDULE)}


@pytest.mark.slow(but=1)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (optax.adamw(SCHEDULE), steady_came(SCHEDULE)),
        (steady_came(SCHEDULE), optax.adamw(SCHEDULE)),
        (inject(optax.adamw)(SCHEDULE), steady_came(SCHEDULE)),
        (optax.adamw(SCHEDULE), inject(steady_came)(SCHEDULE)),
        (inject(optax.adamw)(1e-2), inject(steady_came)(SCHEDULE)),
        (optax.adamw(SCHEDULE), optax.partition(PARTED, {"embed": "a", "kernel": "b"})),
    ],
    ids=["to came", "back", "was injected", "is injected", "is a schedule", "parted"],
)
def test_counts_are_each_transformations_own(old, new):
    """Moved twice, the learning rate's schedule goes on, and what else counts."""
    old, new = (optax.chain(tx, optax.apply_every(4)) for tx in (old, new))
    _, state = converted(old, new)
    other = optax.chain(optax.clip(1.0), new)
    state = convert_state(state, PARAMS, old=new, new=other)
    found = {
        int(x)
        for path, x in jax.tree.leaves_with_path(state)
        if jax.tree_util.keystr(path).endswith("count")
    }
    assert found == {2, 6, 10**7}
    assert state[1][-1].count == 2  # Of apply_every.


def test_a_plateaus_own_count_goes_on():
    """It counts otherwise than schedules do, from 0 to its accumulation size."""
    plateau = optax.contrib.reduce_on_plateau
    old, new = (
        optax.chain(tx, plateau(patience=2, accumulation_size=3))
        for tx in (optax.adamw(SCHEDULE), steady_came(SCHEDULE, mu_dtype="int8"))
    )
    state = old.init(PARAMS)
    for value in 1.0, 1.0, 1.0, 1.0, 0.9:
        _, state = old.update(PARAMS, state, PARAMS, value=value)
    converted = convert_state(state, PARAMS, old=old, new=new)
    assert converted[-1].count == state[-1].count == 2
    jax.tree.map(np.testing.assert_array_equal, converted[-1], state[-1])


def test_two_of_a_kind_stay_two():
    old, new = (
        optax.chain(optax.trace(0.5), tx, optax.trace(0.9))
        for tx in (optax.adamw(1e-3), steady_came(1e-3))
    )
    state, moved = converted(old, new)
    for i in (0, 2):
        jax.tree.map(np.testing.assert_array_equal, moved[i], state[i])
    assert jnp.any(moved[0].trace["kernel"] != moved[2].trace["kernel"])


LABELS = {"embed": "rest", "kernel": "hidden"}


def test_adamw_beside_came_stays():
    old, new = (
        optax.partition({"hidden": tx, "rest": optax.adamw(SCHEDULE)}, LABELS)
        for tx in (steady_came(SCHEDULE), steady_came(SCHEDULE, mu_dtype="int8"))
    )
    state, moved = converted(old, new)
    jax.tree.map(
        np.testing.assert_array_equal,
        moved.inner_states["rest"],
        state.inner_states["rest"],
    )
    mu = moved.inner_states["hidden"].inner_state[0].mu["kernel"]
    assert mu.values.dtype == jnp.int8 and jnp.all(mu.values == 127)


def test_parameters_that_are_parted_otherwise():
    """A parameter's state goes with it, from one branch to another, and out of both."""
    ones, others = LABELS, {"embed": "hidden", "kernel": "rest"}
    old, mixed = (
        optax.partition(
            {"hidden": optax.adamw(SCHEDULE), "rest": steady_came(SCHEDULE)}, labels
        )
        for labels in (ones, others)
    )
    state, moved = converted(old, mixed)
    hidden, rest = (moved.inner_states[x].inner_state for x in ("hidden", "rest"))
    assert (hidden[0].count, hidden[-1].count) == (10**7, 6)  # It was CAME's.
    assert (rest[0].count, rest[-1].count) == (10**7, 6)  # It was Adam's.
    v = state.inner_states["rest"].inner_state[0].v_row["embed"]
    np.testing.assert_allclose(hidden[0].nu["embed"].mean(), v.mean(), rtol=1e-5)
    nu = state.inner_states["hidden"].inner_state[0].nu["kernel"]
    np.testing.assert_allclose(rest[0].v_row["kernel"], nu.mean(1), rtol=1e-5)
    alone = steady_came(SCHEDULE)
    whole = convert_state(moved, PARAMS, old=mixed, new=alone)
    assert whole[-1].count == 6
    jax.tree.map(lambda mu: np.testing.assert_array_less(0, mu), whole[0].mu)


def test_an_injected_hyperparameter_goes_on_unless_it_is_set_otherwise():
    old, new = (
        inject(steady_came)(1e-2, mu_dtype="int8"),
        inject(steady_came)(1e-2, b2=0.99),
    )
    state = after(old, 2)
    state.hyperparams["learning_rate"] = jnp.asarray(1e-4, jnp.float32)
    moved = convert_state(state, PARAMS, old=old, new=new)
    assert float(moved.hyperparams["learning_rate"]) == pytest.approx(1e-4)
    assert float(moved.hyperparams["b2"]) == pytest.approx(0.99)
    assert (moved.count, moved.inner_state[0].count) == (2, 2)
    other = inject(optax.adamw)(2e-3)
    moved = convert_state(moved, PARAMS, old=new, new=other)
    assert float(moved.hyperparams["learning_rate"]) == pytest.approx(2e-3)
    assert float(moved.hyperparams["b2"]) == pytest.approx(0.999)


MASKED = optax.masked(came(1e-3), {"embed": False, "kernel": True})


@pytest.mark.slow(but=2)
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (optax.sgd(1e-3), came(1e-3), "only new has ScaleByCameState at '0'; strict=F"),
        (
            optax.sgd(1e-3, momentum=0.9),
            quantized_ema(0.9),
            "new has QuantizedEmaState; only old has TraceState at '0'",
        ),
        (optax.adamw(1e-3), came(SCHEDULE), "new has ScaleByScheduleState at '2'"),
        (
            optax.chain(optax.ema(0.9), came(1e-3)),
            came(1e-3),
            "only old has EmaState at '0'",
        ),
        (
            optax.MultiSteps(came(1e-3), 4),
            came(1e-3, mu_dtype="int8"),
            "only old has MultiStepsState",
        ),
        (MASKED, came(1e-3), "only new has 'embed' of ScaleByCameState at '0'; strict"),
        (came(1e-3), MASKED, "only old has 'embed' of ScaleByCameState at '0'; strict"),
    ],
    ids=["sgd", "trace", "schedule", "ema", "MultiSteps", "more leaves", "fewer"],
)
def test_what_has_no_counterpart_is_named(old, new, message):
    with pytest.raises(ValueError, match=message):
        converted(old, new)
    _, moved = converted(old, new, strict=False)
    assert jax.tree.structure(moved) == jax.tree.structure(new.init(PARAMS))


@pytest.mark.parametrize(
    ("old", "state_of", "message"),
    [
        (
            optax.chain(came(1.0), came(1e-3)),
            None,
            "old has ScaleByCameState at '0/0', ScaleByCameState at '1/0', new Scale",
        ),
        (
            came(1e-3, factoring=BalancedSplit()),
            came(1e-3),
            "not one of old: '.*heads' has shape",
        ),
    ],
    ids=["two of them", "other rule"],
)
def test_errors(old, state_of, message):
    params = PARAMS | {"heads": jnp.ones((8, 4, 2))}
    state = (state_of or old).init(params)
    with pytest.raises(ValueError, match=message):
        convert_state(state, params, old=old, new=came(1e-3))


def test_a_moved_state_can_be_donated():
    """No buffer is in two places. A number that was put in by hand is an array."""
    old = inject(optax.adamw)(1e-2)
    parted = optax.partition({"rest": came(SCHEDULE), "hidden": came(SCHEDULE)}, LABELS)
    state = after(old, 3)
    state.hyperparams["learning_rate"] = 1e-4
    moved = convert_state(state, PARAMS, old=old, new=parted)
    update = jax.jit(parted.update, donate_argnums=1)
    _, moved = update(PARAMS, moved, PARAMS)
    counts = (moved.inner_states[x].inner_state[-1].count for x in ("rest", "hidden"))
    assert list(counts) == [4, 4]


def test_a_bare_array_as_parameters():
    params = PARAMS["kernel"]
    old, new = optax.adamw(SCHEDULE), steady_came(SCHEDULE, mu_dtype="int8")
    moved = convert_state(after(old, 3, params), params, old=old, new=new)
    assert (moved[0].count, moved[-1].count) == (10**7, 3)
    assert jnp.all(moved[0].mu.values == 127)


def test_report():
    """Of shapes alone, and as a table."""
    shapes = jax.eval_shape(lambda: PARAMS)
    old = optax.chain(optax.ema(0.9), optax.adamw(SCHEDULE))
    new = optax.MultiSteps(steady_came(SCHEDULE, mu_dtype="int8"), 4)
    report = conversion_report(shapes, old=old, new=new)
    inner = "inner_opt_state"
    assert report == ConversionReport(
        kept={f"ScaleByScheduleState at '{inner}/2'": "ScaleByScheduleState at '1/2'"},
        converted={f"ScaleByCameState at '{inner}/0'": "ScaleByAdamState at '1/0'"},
        anew=("MultiStepsState",),
        dropped=("EmaState at '0'",),
    )
    lines = [line.split("  ") for line in str(report).splitlines()]
    kinds = ["kept", "converted", "anew", "dropped"]
    refused = "convert_state does this with strict=False only"
    assert [line[0] for line in lines[1:]] == [*kinds, refused]
    same = conversion_report(PARAMS, old=new, new=new)
    assert len(same.kept) == 3
    assert not (same.converted or same.anew or same.dropped)
    assert refused not in str(same)
