"""Guided backpropagation: the network's own computation, with a reverse pass that lets only positive evidence through.

A network does not have to cooperate. What it computes is traced to a jaxpr, JAX's list of elementary equations; its ReLUs are
recognised there, and behind each is put an identity whose derivative drops negative cotangents. All else is left as it was.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun
from jax.tree_util import Partial

from xaiseg._types import Explainer, Info, Instance, Progress, SaliencyMap
from xaiseg.inference import StitchedPredictor

# Calls that only group equations. They are opened: `jnp.where` is one, and its condition is computed outside.
_CALLS = ("jit", "pjit", "closed_call")
# Those whose bodies are guided where they stand, so that a loop remains a loop and what is recomputed stays recomputed.
_BODIES = (*_CALLS, "scan", "cond", "remat", "remat2", "checkpoint")
# Functions that bring a derivative of their own: `jax.nn.relu` is one. They are never opened, for that would lose it.
_CUSTOM = ("custom_jvp_call", "custom_vjp_call")
# Layout and type, not value: what tells `x` from the transposed `x` that `vmap` compares with zero.
_MOVES = ("broadcast_in_dim", "convert_element_type", "copy", "copy_p", "reshape", "squeeze", "transpose")


def guided(function: Callable[..., Any]) -> Partial:
    """`function` with the same values and the reverse-mode derivative of guided backpropagation.

    Where `a = φ(z)` is an activation and `R = ∂y/∂a` the cotangent that arrives at it, `z` receives `φ'(z) · max(R, 0)` instead
    of `φ'(z) · R`. For a ReLU that is the rule of the paper: a position passes on what is positive and where it was active. The
    paper knows no leak; for LeakyReLU and PReLU the same rule is applied, `φ'` being 1 or the slope. Everything else, other
    activations (GELU, SiLU, ELU, …) included, keeps its derivative.

    function: pure, of pytrees. Arrays in them are traced; other leaves, Python numbers say, reach it as they are. A
    `jax.tree_util.Partial`, such as a `LogitsFn` or `TappedFn`, keeps its leaves: parameters remain arguments of compiled
    programs, and two results share these where the two functions would.

    Recognised, in floating point: `max(x, 0)`, `max(x, s·x)`, `clip(x, 0, c)`, `x · (x > 0)`, and `where(x > 0, x, s·x)` or
    `where(x > 0, x, 0)` with any of `>`, `>=`, `<`, `<=`; with them `jax.nn.relu`, `relu6` and `leaky_relu`, the PReLUs of Flax
    and Equinox, and functions with a custom derivative that compute one of these. So is the ReLU6 within `hard_swish`. A
    `max(x, 0)` under a root is not, being the variance of a norm. They are found within `jit`, `checkpoint`, `scan`, `map` and
    `cond`; not within `while_loop`, which has no reverse mode, `shard_map`, or other functions with a custom derivative.

    Raises ValueError when called, if no activation is recognised, and where JAX does for functions without forward mode.
    The result is not linear in the cotangent: the sum of two pull-backs is not the pull-back of the sum.

    Springenberg, Dosovitskiy, Brox & Riedmiller, *Striving for Simplicity: The All Convolutional Net*, ICLR workshop 2015.

    >>> import jax, jax.numpy as jnp
    >>> from jax.tree_util import Partial
    >>> network = Partial(lambda weights, x: weights @ jax.nn.relu(x), jnp.array([1.0, -1.0, 2.0]))
    >>> x = jnp.array([3.0, 2.0, -1.0])
    >>> jax.grad(network)(x).tolist(), jax.grad(guided(network))(x).tolist()
    ([1.0, -1.0, 0.0], [1.0, 0.0, 0.0])
    """
    if isinstance(function, Partial):
        return Partial(_Guided(function.func), *function.args, **function.keywords)
    return Partial(_Guided(function))


def guided_backprop(base: Explainer) -> Explainer:
    """`base`, applied to the guided network (see `guided`): its derivatives are those of guided backpropagation.

    With `base = jacobian_rows(signed_max())`, row `i` is the guided derivative of the blended logit of voxel `v_i`, in each
    window a product of the layers' transposed Jacobians in which those of activations are `R ↦ φ'(z) · max(R, 0)`. The guided
    derivative of a sum is not the sum of guided derivatives: a linear aggregator (`mean`) pulls each window's summed rows back at
    once, so its map is that of the mean logit. Tiles would split such sums: whole windows are pulled back here, always.
    `guided_backprop(noisy(…))` is `noisy(guided_backprop(…))`. For a class-activation map the layers above the tap are guided;
    the *Guided Grad-CAM* of the literature is another thing, a product of two maps.

    Beware: what is dropped depends on the image more than on the network. The maps look sharp, but act like an edge detector and
    hardly change when the upper layers are randomised (Adebayo et al., *Sanity Checks for Saliency Maps*, NeurIPS 2018). They do
    not tell evidence against a lesion, and are no measure of what the network uses; show them beside a gradient, not in its place.

    Springenberg et al. 2015. The explainer raises ValueError for a network without a ReLU, LeakyReLU or PReLU.

    >>> import jax, jax.numpy as jnp, numpy as np, xaiseg
    >>> def logits_fn(x):  # of class 1: the first channel speaks for it, the second against
    ...     return jax.nn.relu(x) @ jnp.array([[0.0, 1.0], [0.0, -1.0]])
    >>> predictor = xaiseg.StitchedPredictor(logits_fn, window=(4, 4, 4))
    >>> lesion = xaiseg.Instance(1, np.array([[1, 2, 3]], np.int32))
    >>> explain = guided_backprop(xaiseg.jacobian_rows(xaiseg.signed_max()))
    >>> maps, infos = explain(jax.random.key(0), predictor, jnp.ones((4, 4, 4, 2)), [lesion])
    >>> maps[0].values[1, 2, 3].tolist()
    [1.0, 0.0]
    """

    def explain(
        key: Array,
        predictor: StitchedPredictor,
        image: Array,
        instances: Sequence[Instance],
        *,
        progress: Progress | None = None,
    ) -> tuple[list[SaliencyMap], list[Info]]:
        return base(key, _guided_predictor(predictor), image, instances, progress=progress)

    return explain


def _guided_predictor(predictor: StitchedPredictor) -> StitchedPredictor:
    tapped = predictor.tapped_fn
    return replace(
        predictor,
        logits_fn=guided(predictor.logits_fn),
        tapped_fn=None if tapped is None else guided(tapped),
        local_fn=None,
    )


@dataclass(frozen=True)
class _Guided:
    """Hashable by the function it wraps, so that two guided versions of one function share compiled programs."""

    func: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree.flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Array | np.ndarray | np.generic)]
        arrays = [leaves[i] for i in places]

        def flat(*arrays: Array) -> Any:
            filled = dict(enumerate(leaves)) | dict(zip(places, arrays, strict=True))
            args, kwargs = jax.tree.unflatten(tree, filled.values())
            return self.func(*args, **kwargs)

        closed, shapes = jax.make_jaxpr(flat, return_shape=True)(*arrays)
        jaxpr, count = _guide(closed.jaxpr)
        if not count:
            raise ValueError(
                "guided backpropagation found no activation that it could guide: it expects a network with ReLU, LeakyReLU or "
                "PReLU, such as jax.nn.relu(x), jnp.maximum(x, 0) or jnp.where(x >= 0, x, slope * x); use the plain gradient"
            )
        results = jaxpr_as_fun(ClosedJaxpr(jaxpr, closed.consts))(*arrays)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)


@jax.custom_vjp
def _keep_positive(x: Array) -> Array:
    return x


_keep_positive.defvjp(lambda x: (x, None), lambda _, cotangent: (jnp.maximum(cotangent, jnp.zeros_like(cotangent)),))


def _guide(jaxpr: Jaxpr) -> tuple[Jaxpr, int]:
    """`jaxpr` with `_keep_positive` behind each activation, and how many these are. Its inputs and outputs stay the same."""
    inputs = [*jaxpr.constvars, *jaxpr.invars]
    opened, outputs = _opened(jaxpr, dict(zip(inputs, inputs, strict=True)))
    equations = _Equations(opened)
    guided: list[JaxprEqn] = []
    total = 0
    for eqn in opened:
        if equations.is_activation(eqn):
            (y,) = eqn.outvars
            aval: Any = y.aval
            raw = Var(aval)
            keep = jax.make_jaxpr(_keep_positive)(jax.ShapeDtypeStruct(aval.shape, aval.dtype)).jaxpr.eqns[0]
            guided += [eqn.replace(outvars=[raw]), keep.replace(invars=[raw], outvars=[y])]
            total += 1
        elif eqn.primitive.name in _BODIES:
            params, counts = zip(*(_guide_param(value) for value in eqn.params.values()), strict=True)
            if sum(counts):
                eqn = eqn.replace(params=dict(zip(eqn.params, params, strict=True)))
            guided.append(eqn)
            total += sum(counts)
        else:
            guided.append(eqn)
    return jaxpr.replace(eqns=guided, outvars=outputs), total


def _guide_param(value: Any) -> tuple[Any, int]:
    """A parameter of an equation; guided if it is a jaxpr or several, the branches of a `cond`."""
    if isinstance(value, ClosedJaxpr):
        jaxpr, count = _guide(value.jaxpr)
        return ClosedJaxpr(jaxpr, value.consts), count
    if isinstance(value, Jaxpr):
        return _guide(value)
    if isinstance(value, tuple) and any(isinstance(v, ClosedJaxpr | Jaxpr) for v in value):
        values, counts = zip(*map(_guide_param, value), strict=True)
        return values, sum(counts)
    return value, 0


def _opened(jaxpr: Jaxpr, names: dict[Any, Any]) -> tuple[list[JaxprEqn], list[Any]]:
    """The equations and outputs of a jaxpr whose inputs are called as `names` tells, with those of calls in their place.

    Every result gets a new variable: one jaxpr may be called many times.
    """
    names = dict(names)

    def named(atoms: Sequence[Any]) -> list[Any]:
        return [a if isinstance(a, Literal) else names[a] for a in atoms]

    opened: list[JaxprEqn] = []
    for eqn in jaxpr.eqns:
        arguments = named(eqn.invars)
        body = _called(eqn)
        # a call with constants is guided where it stands, since they would have to become arguments
        if body is not None and not body.consts:
            inner, results = _opened(body.jaxpr, dict(zip(body.jaxpr.invars, arguments, strict=True)))
            opened += inner
        else:
            results = [Var(v.aval) for v in eqn.outvars]
            opened.append(eqn.replace(invars=arguments, outvars=results))
        names.update(zip(eqn.outvars, results, strict=True))
    return opened, named(jaxpr.outvars)


def _called(eqn: JaxprEqn, primitives: Sequence[str] = _CALLS) -> ClosedJaxpr | None:
    if eqn.primitive.name not in primitives:
        return None
    return eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))


class _Equations:
    """Where the variables of a list of equations come from and go to, and which of the equations are activations."""

    def __init__(self, eqns: Sequence[JaxprEqn]) -> None:
        self._made: Mapping[Var, JaxprEqn] = {v: eqn for eqn in eqns for v in eqn.outvars}
        self._used: dict[Var, list[JaxprEqn]] = {}
        for eqn in eqns:
            for v in eqn.invars:
                if not isinstance(v, Literal):
                    self._used.setdefault(v, []).append(eqn)

    def is_activation(self, eqn: JaxprEqn) -> bool:
        # integers too are cut off at zero, as indices
        if len(eqn.outvars) != 1 or not jnp.issubdtype(getattr(eqn.outvars[0].aval, "dtype", bool), jnp.floating):
            return False
        name, arguments = eqn.primitive.name, eqn.invars
        if name == "max":
            leaks = any(self._is_multiple(a, b) for a, b in _both_ways(arguments))
            return leaks or (any(map(self._is_zero, arguments)) and not self._is_under_root(eqn.outvars[0]))
        if name == "clamp":
            return self._is_zero(arguments[0])
        if name == "mul":
            signs = [(*self._sign(a), self._source(b)) for a, b in _both_ways(arguments)]
            return any(sign == 1 and x is other for sign, x, other in signs)
        if name == "select_n" and len(arguments) == 3:
            predicate, *branches = arguments
            sign, x = self._sign(predicate)
            negative, positive = branches[::sign] if sign else (None, None)
            return (
                sign != 0
                and self._source(positive) is x
                and (self._is_zero(negative) or self._is_multiple(negative, x))
            )
        body = _called(eqn, _CUSTOM)
        return body is not None and _computes_activation(body.jaxpr)

    def _origin(self, atom: Any) -> tuple[Any, JaxprEqn | None]:
        """What an atom is but for its layout and type, and the equation that made it; None for literals and inputs."""
        while not isinstance(atom, Literal) and (eqn := self._made.get(atom)) is not None:
            if eqn.primitive.name not in _MOVES:
                return atom, eqn
            atom = eqn.invars[0]
        return atom, None

    def _source(self, atom: Any) -> Any:
        return self._origin(atom)[0]

    def _is_zero(self, atom: Any) -> bool:
        source = self._source(atom)
        return isinstance(source, Literal) and not np.any(source.val)

    def _is_multiple(self, atom: Any, x: Any) -> bool:
        """Whether an atom is `x` times or by something."""
        _, eqn = self._origin(atom)
        if eqn is None or eqn.primitive.name not in ("mul", "div"):
            return False
        factors = eqn.invars if eqn.primitive.name == "mul" else eqn.invars[:1]
        source = self._source(x)
        return not isinstance(source, Literal) and any(self._source(f) is source for f in factors)

    def _sign(self, predicate: Any) -> tuple[int, Any]:
        """`(1, x)` for a predicate `x > 0` or `x >= 0`, `(-1, x)` for `x < 0` or `x <= 0`, else `(0, None)`."""
        _, eqn = self._origin(predicate)
        if eqn is not None and eqn.primitive.name in ("gt", "ge", "lt", "le"):
            sign = 1 if eqn.primitive.name in ("gt", "ge") else -1
            left, right = eqn.invars
            if self._is_zero(right):
                return sign, self._source(left)
            if self._is_zero(left):
                return -sign, self._source(right)
        return 0, None

    def _is_under_root(self, start: Var) -> bool:
        """Whether a root is taken of a value, or of it with something added, as norms do of a variance kept from being negative."""
        waiting, seen = [start], {start}
        while waiting:
            value = waiting.pop()
            for eqn in self._used.get(value, []):
                if eqn.primitive.name in ("sqrt", "rsqrt", "pow") and eqn.invars[0] is value:
                    return True
                if eqn.primitive.name in (*_MOVES, "add", "gather"):  # Flax repeats a group's variance by indexing
                    new = set(eqn.outvars) - seen
                    waiting += new
                    seen |= new
        return False


def _computes_activation(jaxpr: Jaxpr) -> bool:
    """Whether the only result of a jaxpr is an activation; it may be cut off above, as that of a ReLU6."""
    opened, outputs = _opened(jaxpr, {v: v for v in [*jaxpr.constvars, *jaxpr.invars]})
    equations = _Equations(opened)
    if len(outputs) != 1:
        return False
    _, eqn = equations._origin(outputs[0])
    if eqn is not None and eqn.primitive.name == "min":
        made = [equations._origin(v)[1] for v in eqn.invars]
        return any(e is not None and equations.is_activation(e) for e in made)
    return eqn is not None and equations.is_activation(eqn)


def _both_ways(pair: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    left, right = pair
    yield left, right
    yield right, left
