"""Fits a whole population of heads (folds × seeds × settings) as one compiled program.

Members share the bags and their order, and differ in targets, in the weight of each bag, in first weights, in
learning rate and weight decay, and in the standardisation of their training part. A bag that a member does not
train on weighs nothing and moves nothing of it. Member i of a population is the member trained alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from pathme_jax.errors import UserError
from pathme_jax.mil.buckets import Bucket
from pathme_jax.mil.feed import Feed
from pathme_jax.mil.folds import TRAIN, VALIDATION
from pathme_jax.mil.heads import absorb
from pathme_jax.mil.heads.common import Bag
from pathme_jax.mil.tasks import Tasks

Array = jax.Array
AUTO = jax.sharding.AxisType.Auto
EACH, ALL = PartitionSpec("members"), PartitionSpec()
STEPS, BAGS = PartitionSpec(None, "members"), PartitionSpec(None, "instances")
MAPS = 32_000
PART = 8192  # instances at once where their mean is taken in float64
LARGE = 256  # instances of a bag from which on members that hold it out are not computed at all
GROUP_BYTES = 2 << 30  # of hidden activations at once on a device; members beyond that take turns
CPU_BYTES = 128 << 20  # beyond which members on a CPU are quicker one by one, below all at once


@dataclasses.dataclass
class Members:
    """What the p members differ in, over n bags.

    Attributes:
        parts: (p, n) UNUSED, TRAIN, VALIDATION or TEST.
        targets: (p, n, t) float32, see `tasks`.
        weights: (p, n, tasks) weight of each bag in the loss of each task; zero off the training part.
        seeds: (p,) of the first weights.
        rates: (p,) peak learning rate. decays: (p,) weight decay of AdamW.
    """

    parts: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    seeds: np.ndarray
    rates: np.ndarray
    decays: np.ndarray

    def __len__(self) -> int:
        return len(self.parts)

    def take(self, which: Any) -> Members:
        """Some of them."""
        return Members(*(getattr(self, f.name)[which] for f in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long and in what portions.

    Attributes:
        epochs: at most. batch: bags a step.
        patience: epochs without a better validation loss after which a member rests; 0: none does.
        seed: of the order of bags and of dropout, which members share.
    """

    epochs: int
    batch: int = 1
    patience: int = 0
    seed: int = 0


@dataclasses.dataclass
class Population:
    """Fitted members.

    Attributes:
        params: tree of (p, ...) arrays: heads that take raw features.
        losses: (steps, p) of each step, NaN where a member trained on none of its bags.
        history: (p, epochs, 2) mean training and validation loss, NaN where there is none.
        best: (p,) epoch whose parameters were kept.
    """

    head: Any
    tasks: Tasks
    params: Any
    losses: np.ndarray
    history: np.ndarray
    best: np.ndarray

    def take(self, which: np.ndarray) -> Population:
        """Some of the members."""
        params = jax.tree.map(lambda leaf: leaf[which], self.params)
        own = (self.losses[:, which], self.history[which], self.best[which])
        return Population(self.head, self.tasks, params, *own)


def fit(
    head: Any,
    tasks: Tasks,
    buckets: Sequence[Bucket],
    members: Members,
    schedule: Schedule,
    *,
    resident: int | None = None,
    instances: int = 1,
    name: str = "mil",
    progress: bool = True,
) -> Population:
    """Trains all members with AdamW and a cosine to zero, spread over this process's devices.

    A member with a validation part keeps the parameters of the epoch of least validation loss, others the last.

    Args:
        resident: bytes of bags that may stay on a device, see `feed.Feed`; more are streamed.
        instances: devices over which the instances of each bag are spread, for bags too large for one; pack them
            with this `multiple`. The other devices share the members.
    """
    make_room()
    count, mesh = len(members), mesh_of(instances)
    here = mesh.shape["members"]
    members = members.take(np.resize(np.arange(count), -(-count // here) * here))

    def put(tree: Any, spec: PartitionSpec) -> Any:
        return jax.device_put(tree, NamedSharding(mesh, spec))

    mean, std = standardisation(buckets, members.parts)
    fixed = put({"mean": mean, "std": std, "decay": np.float32(members.decays)}, EACH)
    state = put(_init(head, len(mean[0]), members.seeds), EACH)
    feed = Feed(buckets, lambda bags: put(bags, BAGS), resident)
    group = [_group(state, bucket, schedule.batch, mesh) for bucket in buckets]
    active = [_active(members, bucket, schedule.batch, here) for bucket in buckets]
    steps = sum(-(-len(bucket.index) // schedule.batch) for bucket in buckets) * schedule.epochs
    key = put(jax.random.key(schedule.seed), ALL)

    held = _held(tasks, members)
    validated = (members.parts == VALIDATION).any(1)
    best = jax.tree.map(jnp.copy, state["params"])  # the state itself is given away each run
    least = np.full(len(members), np.inf)
    kept, resting = np.zeros(len(members), int), np.zeros(len(members), bool)
    history = np.full((len(members), schedule.epochs, 2), np.nan)
    losses: list[np.ndarray] = []
    done = 0
    epochs = tqdm(
        range(schedule.epochs),
        desc=name,
        unit="epoch",
        leave=False,
        disable=None if progress else True,
    )
    for epoch in epochs:
        begun = []
        for run in feed.epoch(schedule.batch, [schedule.seed, 4, epoch]):
            index, real = buckets[run.which].index[run.rows], (run.rows >= 0).any(1)
            step = done + np.cumsum(real) - 1
            done += int(real.sum())
            decay = (1 + np.cos(np.pi * step / steps)) / 2
            weights = np.where((run.rows >= 0)[..., None], members.weights[:, index], 0)
            weights = np.where(resting[:, None, None, None], 0, weights).swapaxes(0, 1)
            plan = {
                "targets": members.targets[:, index].swapaxes(0, 1),
                "weights": weights.astype(np.float32),
                "rate": np.float32(members.rates * decay[:, None]),
                "active": _first(weights.max((2, 3)) > 0, active[run.which], here),
            }
            common = {"places": run.places, "real": real, "step": step}
            compiled = _compiled(
                _run,
                mesh,
                (head, tasks.form, group[run.which]),
                (EACH, EACH, ALL, ALL, STEPS, ALL),
                (EACH, STEPS),
            )
            state, loss = compiled(state, fixed, key, run.bags, put(plan, STEPS), put(common, ALL))
            begun.append((loss, weights.sum((2, 3)), real))
        epoch_losses = np.concatenate([np.asarray(loss)[real] for loss, _, real in begun])
        epoch_weights = np.concatenate([weight[real] for _, weight, real in begun])
        history[:, epoch, 0] = _mean(epoch_losses.sum(0), epoch_weights.sum(0))
        losses.append(_mean(epoch_losses, epoch_weights))
        if not validated.any():
            best, kept[:] = state["params"], epoch
            continue
        logits = _all_logits(head, mesh, state["params"], fixed, feed, group)
        found = _validation_loss(tasks, logits, held)
        history[:, epoch, 1] = np.where(resting, np.nan, found)
        # Without a validation loss yet, the last epoch is kept.
        better = ~resting & (~validated | (found < least) | (np.isnan(found) & np.isinf(least)))
        least = np.where(better & np.isfinite(found), found, least)
        kept = np.where(better, epoch, kept)
        best = _select(put(better, EACH), state["params"], best)
        if schedule.patience:
            resting |= validated & (epoch - kept >= schedule.patience)
            if resting.all():
                break
    raw = jax.vmap(absorb)(best, fixed["mean"], fixed["std"])
    return Population(
        head,
        tasks,
        jax.tree.map(lambda leaf: np.asarray(leaf)[:count], raw),
        np.concatenate(losses)[:, :count],
        history[:count],
        kept[:count],
    )


def make_room() -> None:
    """Lets go of compiled programs where this process has mapped half of what Linux allows it (65,530 pieces).

    On a CPU each program maps some hundreds, and a dozen cross-validations of sixteen sizes would end in "cannot
    allocate memory".
    """
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPS:
        _compiled.cache_clear()
        _starts.cache_clear()
        jax.clear_caches()


def mesh_of(instances: int = 1) -> Mesh:
    """This process's devices, `instances` to each bag, the rest to the members.

    Raises:
        UserError: that many do not divide the devices.
    """
    devices = jax.local_device_count()
    if instances < 1 or devices % instances:
        raise UserError(
            f"bags spread over {instances} devices, of which there are {devices}",
            "Expected a divisor of the devices",
        )
    return jax.make_mesh((devices // instances, instances), ("members", "instances"), (AUTO, AUTO))


def _mean(total: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return np.where(weight > 0, total / np.where(weight > 0, weight, 1), np.nan)


def standardisation(buckets: Sequence[Bucket], parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(p, d) mean and standard deviation over the instances of each member's training bags."""
    train = (parts == TRAIN).astype(np.float64)
    sums = np.zeros((3, train.shape[1], buckets[0].width))
    for bucket in buckets:
        for row, i in enumerate(bucket.index):
            features = bucket.read(row)[0]
            for part in np.array_split(features, -(-len(features) // PART)):
                mine = part.astype(np.float64)
                sums[0, i] += len(mine)
                sums[1, i] += mine.sum(0)
                sums[2, i] += np.einsum("md,md->d", mine, mine)
    count, total, square = (train @ each for each in sums)
    mean = total / count
    std = np.sqrt(np.maximum(square / count - mean**2, 0))
    std[std <= 1e-4 * np.abs(mean) + 1e-8] = 1  # a constant feature must not be blown up
    return mean.astype(np.float32), std.astype(np.float32)


# ---- on the devices ---------------------------------------------------------------------------------


def _init(head: Any, width: int, seeds: np.ndarray) -> dict[str, Any]:
    """First weights from each member's seed: members of one seed start alike."""
    drawn, mine = np.unique(seeds, return_inverse=True)
    return jax.tree.map(lambda x: x[mine], _starts(head, width)(drawn))


@functools.lru_cache(maxsize=64)
def _starts(head: Any, width: int) -> Any:
    bag = Bag(jnp.zeros((1, width)), jnp.ones(1, bool), jnp.zeros((1, 2), jnp.int32))

    def one(seed: Array) -> dict[str, Any]:
        params = head.init(jax.random.key(seed), bag)["params"]
        return {"params": params, "moments": optax.scale_by_adam().init(params)}

    return jax.jit(jax.vmap(one))


def parameters(head: Any, width: int) -> int:
    """Of one member that takes features of this width."""
    shapes = jax.eval_shape(_starts(head, width), jnp.zeros(1, int))["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def _group(state: Any, bucket: Bucket, batch: int, mesh: Mesh) -> int:
    """How many members a device works on at once, so that what they hold of a step's bags fits."""
    params = state["params"]
    own = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) * 4 // 3  # and a gradient
    hidden = params["embed"]["kernel"].shape[-1] if "embed" in params else 64
    held = 6 * 4 * batch * bucket.size // mesh.shape["instances"] * hidden
    count = len(jax.tree.leaves(params)[0]) // mesh.shape["members"]
    if jax.default_backend() == "cpu" and own // mesh.shape["members"] + count * held > CPU_BYTES:
        return 1
    return max(1, min(count, GROUP_BYTES // held))


def _active(members: Members, bucket: Bucket, batch: int, devices: int) -> int:
    """How many members of a device a step must work on. Fewer than all where every bag is held out of some, and it
    is so large that taking them apart costs less than it saves."""
    here = len(members) // devices
    if batch > 1 or bucket.size < LARGE:
        return here
    training = members.weights[:, bucket.index].any(2).reshape(devices, here, -1)
    return int(training.sum(1).max())


def _first(training: np.ndarray, count: int, devices: int) -> np.ndarray:
    """(k, devices * count) int32: of each step and device `count` of its members, those that train first.

    training: (k, p) bool.
    """
    by_device = training.reshape(len(training), devices, -1)
    order = np.argsort(~by_device, axis=2, kind="stable")[..., :count]
    return order.reshape(len(training), -1).astype(np.int32)


@functools.lru_cache(maxsize=64)
def _compiled(function: Any, mesh: Any, static: tuple, takes: tuple, gives: Any) -> Any:
    mapped = jax.shard_map(
        functools.partial(function, *static),
        mesh=mesh,
        in_specs=takes,
        out_specs=gives,
        axis_names={"members"},  # the instances are the compiler's to divide
        check_vma=False,
    )
    return jax.jit(mapped, donate_argnums=(0,) if function is _run else ())


def _run(
    head: Any,
    tasks: Tasks,
    group: int,
    state: Any,
    fixed: Any,
    key: Array,
    bags: Bag,
    plan: Any,
    common: Any,
) -> tuple[Any, Array]:
    """k steps of all members here on bags of one size; returns (state, (k, p) summed weighted loss)."""

    def step(state: Any, now: Any) -> tuple[Any, Array]:
        plan, common = now
        seen = jax.tree.map(lambda x: x[common["places"]], bags)
        here = jax.random.fold_in(key, common["step"])

        nothing = jnp.zeros(len(plan["rate"]))
        some = plan["active"]
        own = {key: value for key, value in plan.items() if key != "active"}

        def update(each: Any) -> tuple[Any, Array]:
            return _update(head, tasks, seen, here, *each)

        def do(state: Any) -> Any:
            if not len(some):
                return state, nothing
            everyone = (state, fixed, own)
            if len(some) == len(nothing):
                return _in_turns(update, everyone, group)

            def one(i: Array) -> tuple[Any, Array]:
                return update(jax.tree.map(lambda x: x[i], everyone))

            new, loss = _in_turns(one, some, group)
            # Put back once a step: turns that write into the state would copy all of it each time.
            state = jax.tree.map(lambda x, y: x.at[some].set(y), state, new)
            return state, nothing.at[some].set(loss)

        def rest(state: Any) -> Any:
            return state, nothing

        return jax.lax.cond(common["real"], do, rest, state)

    return jax.lax.scan(step, state, (plan, common))


def _in_turns(function: Any, each: Any, group: int) -> Any:
    """`function` of each member, `group` of them at once, or some fewer where that leaves none over: what is left
    over is compiled once more."""
    count = len(jax.tree.leaves(each)[0])
    if count <= group:
        return jax.vmap(function)(each)
    if group == 1:  # a batch of one would make its products batched ones, which are slower
        return jax.lax.map(function, each)
    even = (size for size in range(group, group // 2, -1) if count % size == 0)
    return jax.lax.map(function, each, batch_size=next(even, group))


def _update(
    head: Any, tasks: Tasks, bags: Bag, key: Array, state: Any, fixed: Any, plan: Any
) -> tuple[Any, Array]:
    """One step of one member on a batch of bags. The key is every member's: one dropout mask for all."""
    split, drop = jax.random.split(key)
    count = len(bags.mask)
    rngs = {"split": jax.random.split(split, count), "dropout": jax.random.split(drop, count)}

    def loss(params: Any) -> tuple[Array, Array]:
        raw = absorb(params, fixed["mean"], fixed["std"])

        def apply(bag: Bag, rngs: Any) -> Any:
            return head.apply({"params": raw}, bag, train=True, rngs=rngs)

        out = jax.vmap(apply)(bags, rngs)
        total = jnp.zeros(())
        for weight, logits in out.streams:
            total += tasks.loss(logits, plan["targets"], plan["weights"] * weight[:, None])
        if hasattr(head, "extra") and tasks.classes is not None:
            own = jax.vmap(head.extra)(out, tasks.label(plan["targets"]))
            total += (own * plan["weights"][:, tasks.classes]).sum()
        return total / count, total

    gradient, total = jax.grad(loss, has_aux=True)(state["params"])
    direction, moments = optax.scale_by_adam().update(gradient, state["moments"])
    params = jax.tree.map(
        lambda p, u: p - plan["rate"] * (u + fixed["decay"] * p), state["params"], direction
    )
    # A batch without a training bag must not move the member.
    seen = plan["weights"].sum() > 0
    new = {"params": params, "moments": moments}
    return jax.tree.map(lambda a, b: jnp.where(seen, a, b), new, state), total


@jax.jit
def _select(better: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(
        lambda a, b: jnp.where(better.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old
    )


# ---- answers ----------------------------------------------------------------------------------------


def _answer(head: Any, group: int, params: Any, fixed: Any, bags: Bag, places: Array) -> Array:
    """(b, p, o) logits of all members on some bags of one size, one bag after another."""

    def of_bag(place: Array) -> Array:
        bag = jax.tree.map(lambda x: x[place], bags)

        def one(member: Any) -> Array:
            params, fixed = member
            return head.apply({"params": absorb(params, fixed["mean"], fixed["std"])}, bag).logits

        return _in_turns(one, (params, fixed), group)

    return jax.lax.map(of_bag, places)


def _all_logits(
    head: Any, mesh: Mesh, params: Any, fixed: Any, feed: Feed, groups: Sequence[int]
) -> np.ndarray:
    """(p, n, o)"""
    n = sum(len(bucket.index) for bucket in feed.buckets)
    found: Any = None
    for run in feed.once():
        answer = _compiled(_answer, mesh, (head, groups[run.which]), (EACH, EACH, ALL, ALL), STEPS)
        places = jax.device_put(run.places[:, 0], NamedSharding(mesh, ALL))
        logits = np.asarray(answer(params, fixed, run.bags, places))
        if found is None:
            found = np.zeros((logits.shape[1], n, logits.shape[2]), np.float32)
        found[:, feed.buckets[run.which].index[run.rows[:, 0]]] = logits.swapaxes(0, 1)
    return found


def _held(tasks: Tasks, members: Members) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each member's validation part the bags (p, v), targets (p, v, t) and weights (p, v, tasks), every class of
    a task weighing the same; filled up to one v with bags that weigh nothing."""
    held = members.parts == VALIDATION
    bags = np.argsort(~held, axis=1, kind="stable")[:, : held.sum(1).max()]
    real = np.take_along_axis(held, bags, 1)[..., None]
    targets = np.where(real, np.take_along_axis(members.targets, bags[..., None], 1), np.nan)
    return bags, targets, np.array([balance(tasks, each) for each in targets])


def _validation_loss(
    tasks: Tasks, logits: np.ndarray, held: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> np.ndarray:
    """(p,) mean loss of each member's validation part; NaN without one."""
    bags, targets, weights = held
    own = np.take_along_axis(logits, bags[..., None], 1)
    total = np.asarray(_losses(tasks.form, own, targets, weights))
    # A risk set without an event has a loss of exactly zero, which tells nothing.
    return np.where(total == 0, np.nan, _mean(total, weights.sum((1, 2))))


@functools.partial(jax.jit, static_argnums=0)
def _losses(tasks: Tasks, *each: Array) -> Array:
    """(p,) from (p, v, …); some members at once, since a risk set is v × v."""
    return jax.lax.map(lambda mine: tasks.loss(*mine), each, batch_size=64)


def balance(tasks: Tasks, targets: np.ndarray) -> np.ndarray:
    """(n, tasks) weights by which every class of a task weighs the same; their mean over what is known is 1."""
    weights = np.zeros((len(targets), len(tasks.each)), np.float32)
    for i, (task, target) in enumerate(zip(tasks.each, tasks.targets_of(targets), strict=True)):
        known = ~np.isnan(target).all(-1)
        weights[known, i] = 1
        if task.kind == "classes":
            for label in np.unique(target[known]):
                mine = target[:, 0] == label
                weights[mine, i] = known.sum() / mine.sum() / len(np.unique(target[known]))
    return weights


def predict(
    population: Population, buckets: Sequence[Bucket], pairs: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Answers of given members on given bags, all instances used.

    Args:
        pairs: (q, 2) member and bag.

    Returns:
        (q, o) logits, and q arrays (a, m) of attention over the bag's instances.
    """
    logits = np.zeros((len(pairs), population.tasks.outputs), np.float32)
    attention: list[np.ndarray] = [np.empty(0)] * len(pairs)
    for bucket in buckets:
        for row, bag in enumerate(bucket.index.tolist()):
            wanted = np.flatnonzero(pairs[:, 1] == bag)
            this = jax.tree.map(lambda leaf: leaf[0], bucket.arrays([row])) if len(wanted) else None
            for i in wanted:
                member = pairs[i, 0]
                mine = jax.tree.map(lambda leaf, member=member: leaf[member], population.params)
                out = _one(population.head, mine, this)
                logits[i] = out.logits
                attention[i] = np.asarray(out.attention)[:, : bucket.lengths[row]]
    return logits, attention


@functools.partial(jax.jit, static_argnums=0)
def _one(head: Any, params: Any, bag: Bag) -> Any:
    return head.apply({"params": params}, bag)
