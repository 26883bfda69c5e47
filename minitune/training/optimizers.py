"""AdamW and SGD over flat tensors, as drop-in torch.optim.Optimizer classes, and clipping by global norm."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, get_args

import torch
from torch import Tensor

from minitune.arguments import check_at_least_zero, is_number, short
from minitune.config import Moments
from minitune.errors import InputError
from minitune.ops.adamw import adamw_, adamw_8bit_
from minitune.ops.moments8 import BLOCK
from minitune.ops.sgd import sgd_
from minitune.training.clip import asks, clip_gradients, clip_scale, global_norm, sound
from minitune.training.flat import Buffer, buffers_of

MOMENTS = get_args(Moments)
Parameters = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class FlatOptimizer(torch.optim.Optimizer, ABC):
    """What AdamW and SGD share: a group's small fp32 parameters lie in one buffer a device and move in one launch, its
    large ones (`flat.is_whole`) in one each.

    Making the optimizer moves the small parameters: ``p.data`` becomes a view of the buffer, ``p.grad`` a view of the
    gradient buffer, into which autograd accumulates. Values, shapes and the Parameter objects stay. A gradient put
    there by somebody else is copied in. Large parameters stay where they are; their gradient is whatever tensor is
    there, which clipping scales in place, as torch's does, and `zero_grad` takes its memory back. A parameter that got
    no gradient since `zero_grad` is skipped, as torch does with ``grad is None``: it neither decays nor moves on its
    moments. After a step the version counter of every parameter that took part has moved. `state` and `state_dict` are
    torch's own, parameter by parameter.

    Raises InputError where an argument, a parameter or a loaded state does not fit, naming it.
    """

    _moment_names: tuple[str, ...] = ()
    _needed_on_load: tuple[str, ...] = ()
    _refused_on_load: tuple[str, ...] = ()
    _torchs_decay_is_decoupled = False

    def __init__(self, params: Parameters, defaults: dict[str, Any]) -> None:
        name = type(self).__name__
        if isinstance(params, Tensor):
            raise InputError(f"{name}: params is one tensor; give a list of parameters")
        if isinstance(params, str | dict) or not isinstance(params, Iterable):
            raise InputError(f"{name}: params is {short(params)}; give a list of parameters, or of groups such as "
                             '{"params": [...], "lr": 1e-4}')
        members: list[Any] = list(params)
        if not members:
            raise InputError(f"{name}: params is empty, nothing is trained; load the model with lora=… or train=…")
        self._flats: list[list[Buffer]] = []
        self._scale: Tensor | None = None
        self._keeps = False
        super().__init__(members, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add {"params": parameters or (name, parameter) pairs, and what differs from the defaults}."""
        # Not torch's own method: calling that one imports torch._dynamo, a second of every start.
        if not isinstance(param_group, dict) or not isinstance(param_group.get("params"), Iterable):
            raise InputError(f"{type(self).__name__}: group {len(self.param_groups)} is {short(param_group)}; it must "
                             'be a table such as {"params": [...], "lr": 1e-4}')
        group = {**self.defaults, **param_group}
        given = group["params"]
        given = [given] if isinstance(given, Tensor) else list(given)
        named = [(f"parameter {i} of group {len(self.param_groups)}", p) if not isinstance(p, tuple) else p
                 for i, p in enumerate(given)]
        if any(isinstance(p, tuple) for p in given):
            group["param_names"] = [n for n, _ in named]
        group["params"] = [p for _, p in named]
        self._check_group(group)
        self._check_parameters(named)
        self.param_groups.append(group)
        self._flats.append(_flatten(group))
        for flat in self._flats[-1]:
            flat.keep_gradients(self._keeps)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. `closure` computes the loss anew; it is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, self._scale = self._scale, None
        for group, flats in zip(self.param_groups, self._flats, strict=True):
            for flat in flats:
                active = flat.gather()
                if any(active):
                    self._advance(group, flat, active, scale)
        return loss

    def clip(self, max_norm: float | None, loss: Tensor | None = None) -> Tensor:
        """The global norm of all gradients (fp32, 0-dim, on the device); the next `step` scales them to `max_norm`, or
        with None or 0 leaves them. Where the norm is not finite, or the `loss` (0-dim), that step changes nothing.

        Nothing is scaled yet and the device is not asked: the step multiplies the factor in. `zero_grad` forgets it.
        """
        check_max_norm(max_norm)
        parts = [flat.grad[part] for flats in self._flats for flat in flats
                 for _, part in flat.runs(flat.gather(), lambda i: None)]
        norm = global_norm(parts)
        self._scale = clip_scale(sound(norm, loss), max_norm)
        if not max_norm and asks(self._scale.device) and not self._scale.isnan():
            self._scale = None      # one pass less over the gradients, where asking costs nothing
        return norm

    def step_only_if(self, sound: Tensor) -> None:
        """The next `step` changes nothing where `sound` (bool, 0-dim, on the device, which is not asked) is False."""
        scale = torch.ones((), device=sound.device) if self._scale is None else self._scale
        self._scale = torch.where(sound, scale, math.nan)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients. Those of small parameters are zeroed in one call and stay views, never None; those of
        large ones are None, as torch makes them.

        At the next step a parameter without a new gradient is skipped (`set_to_none`), or takes part with a zero one;
        with torch that is so for those alone that had one before.
        """
        self._scale = None
        for flats in self._flats:
            for flat in flats:
                flat.zero_grad(zeros_count=not set_to_none)

    def keep_gradients(self, on: bool = True) -> None:
        """Whether each gradient, once it is there, stays at its address whatever `zero_grad` does, as somebody needs it
        who writes it behind autograd's back (a CUDA graph). A copy of the optimizer does not take this over."""
        self._keeps = on
        for flats in self._flats:
            for flat in flats:
                flat.keep_gradients(on)

    def release_gradients(self) -> None:
        """Give the memory of large gradients back, as `zero_grad` does, and leave the small ones as they are."""
        for flats in self._flats:
            for flat in flats:
                flat.release()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state in torch's format: ours, or that of the torch optimizer of the same name.

        Moments that were kept in 8 bits are decoded for an optimizer that keeps them in fp32, and the other way round.
        """
        self._check_loaded(state_dict)
        kinds = [group["moments"] for group in self.param_groups]      # this optimizer's buffers, not the other one's
        super().load_state_dict(state_dict)
        for group, kind in zip(self.param_groups, kinds, strict=True):
            group["moments"] = kind
        self._take_state()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_flats" not in self.__dict__:  # a copy or an unpickled optimizer: its parameters are new ones
            self._scale, self._keeps = None, False
            self._flats = [_flatten(group) for group in self.param_groups]
            self._take_state()

    def _advance(self, group: dict[str, Any], flat: Buffer, active: list[bool], scale: Tensor | None) -> None:
        done = flat.steps.tolist()
        if scale is not None:
            scale = scale.to(flat.device, non_blocking=True)
        for first, part in flat.runs(active, lambda i: done[i]):
            self._update(group, flat, part, int(done[first]), scale)
        flat.steps += torch.tensor(active, dtype=torch.float32)
        for i, p in enumerate(flat.params):
            if active[i] and not self.state.get(p):
                self._show_state(group, flat, i)
        torch.autograd.graph.increment_version([p for i, p in enumerate(flat.params) if active[i]])

    @abstractmethod
    def _update(self, group: dict[str, Any], flat: Buffer, part: slice, done: int, scale: Tensor | None) -> None:
        """Apply the op to one run of parameters that have `done` steps behind them."""

    @abstractmethod
    def _show_state(self, group: dict[str, Any], flat: Buffer, i: int) -> None:
        """Put views of the moments of parameter `i` into ``self.state``, under torch's names."""

    @abstractmethod
    def _check_group(self, group: dict[str, Any]) -> None:
        """InputError where a setting of the group is wrong."""

    def _take_state(self) -> None:
        """Copy the tensors in ``self.state`` into the flat buffers and put views in their place."""
        for group, flats in zip(self.param_groups, self._flats, strict=True):
            group.update({name: default for name, default in self.defaults.items() if name not in group})
            for flat in flats:
                for i, p in enumerate(flat.params):
                    loaded = {k: v for k, v in self.state.get(p, {}).items() if v is not None}
                    flat.steps[i] = float(loaded.get("step", 1.0 if loaded else 0.0))
                    for name in self._moment_names:
                        flat.load_state(name, i, loaded)
                    self.state.pop(p, None)
                    if loaded:
                        self._show_state(group, flat, i)

    def _check_loaded(self, state_dict: dict[str, Any]) -> None:
        name = type(self).__name__
        saved, groups = state_dict["param_groups"], self.param_groups
        sizes, wanted = [len(g["params"]) for g in saved], [len(g["params"]) for g in groups]
        if sizes != wanted:
            raise InputError(f"{name}: the state is for groups of {sizes} parameters, this optimizer has {wanted}")
        for index, group in enumerate(saved):
            for key in self._refused_on_load:
                if group.get(key):
                    raise InputError(f"{name}: the state's group {index} has {key}={group[key]!r}, which minitune's "
                                     f"{name} does not do; save it without, or go on with the optimizer that wrote it")
            if group.get("weight_decay") and not group.get("decoupled_weight_decay", self._torchs_decay_is_decoupled):
                raise InputError(f"{name}: the state's group {index} has weight_decay={group['weight_decay']!r} as a "
                                 "part of the gradient; here it is decoupled, so that run can't be continued")
            self._check_group({**self.defaults, **group, "moments": groups[index]["moments"]})
        for old, new in zip(saved, groups, strict=True):
            for key, p in zip(old["params"], new["params"], strict=True):
                entry = state_dict["state"].get(key, {})
                self._check_entry(key, p, {k: v for k, v in entry.items() if v is not None})

    def _check_entry(self, key: Any, p: Tensor, entry: dict[str, Tensor]) -> None:
        name, absent = type(self).__name__, set(self._needed_on_load) - entry.keys()
        for moment in self._moment_names:
            absmax = (-(-p.numel() // BLOCK),)
            for field, shape in ((moment, p.shape), (f"{moment}_codes", p.shape), (f"{moment}_absmax", absmax)):
                if field in entry and entry[field].shape != shape:
                    raise InputError(f"{name}: the state's {field} of parameter {key} is {list(entry[field].shape)}, "
                                     f"the parameter is {list(p.shape)}; it belongs to another model")
            if {f"{moment}_codes", f"{moment}_absmax"} <= entry.keys():
                absent.discard(moment)
        if entry and absent:
            raise InputError(f"{name}: the state of parameter {key} has {sorted(entry)}; it needs "
                             f"{', '.join(self._needed_on_load)}")

    def _check_parameters(self, named: list[tuple[str, Tensor]]) -> None:
        name = type(self).__name__
        known = {id(p) for group in self.param_groups for p in group["params"]}
        for label, p in named:
            if not isinstance(p, Tensor):
                raise InputError(f"{name}: {label} is a {type(p).__name__}; it must be a parameter")
            if p.dtype != torch.float32:
                raise InputError(f"{name}: {label} is {p.dtype} {list(p.shape)}; the optimizer keeps master weights in "
                                 "torch.float32. Give model.trainable_parameters(), which are float32")
            if not p.is_leaf or p.is_meta or p.is_sparse:
                raise InputError(f"{name}: {label} {list(p.shape)} is no dense leaf tensor with storage")
            if id(p) in known:
                raise InputError(f"{name}: {label} {list(p.shape)} is given twice")
            known.add(id(p))


class AdamW(FlatOptimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101): ``torch.optim.AdamW`` to a few ulp, in one launch for all
    small parameters of a group.

    `params`: parameters, (name, parameter) pairs, or groups (dicts) with their own lr, betas, eps, weight_decay and
    moments. `moments`: "fp32", 8 bytes a parameter; or "8bit", 2 bytes: codes by blocks of 256 values (Dettmers et al.
    2022, arXiv:2110.02861; ops/moments8.py). Then `state_dict` holds codes and absmax of each block, with which a run
    goes on bit for bit; torch's AdamW cannot read them, but this one with moments="fp32" can, and torch's can read
    what that one saves.
    """

    _moment_names = ("exp_avg", "exp_avg_sq")
    _needed_on_load = ("step", "exp_avg", "exp_avg_sq")
    _refused_on_load = ("amsgrad", "maximize")
    _torchs_decay_is_decoupled = True

    def __init__(self, params: Parameters, lr: float = 2e-4, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0, *, moments: str = "fp32") -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
                                  "decoupled_weight_decay": True, "moments": moments})

    def _update(self, group: dict[str, Any], flat: Buffer, part: slice, done: int, scale: Tensor | None) -> None:
        beta1, beta2 = group["betas"]
        settings = {"lr": group["lr"], "beta1": beta1, "beta2": beta2, "eps": group["eps"],
                    "weight_decay": group["weight_decay"], "step": done + 1, "grad_scale": scale}
        if flat.in_8_bits:
            adamw_8bit_(flat.data[part], flat.grad[part], flat.moment8("exp_avg").part(part),
                        flat.moment8("exp_avg_sq").part(part), **settings)
        else:
            adamw_(flat.data[part], flat.grad[part], flat.moment("exp_avg")[part], flat.moment("exp_avg_sq")[part],
                   **settings)

    def _show_state(self, group: dict[str, Any], flat: Buffer, i: int) -> None:
        moments = [flat.state(name, i) for name in self._moment_names]
        self.state[flat.params[i]] = {"step": flat.steps[i], **moments[0], **moments[1]}

    def _check_group(self, group: dict[str, Any]) -> None:
        check_at_least_zero("AdamW", lr=group["lr"], eps=group["eps"], weight_decay=group["weight_decay"])
        betas = group["betas"]
        if not isinstance(betas, tuple | list) or len(betas) != 2 or not all(
                is_number(b) and 0 <= b < 1 for b in betas):
            raise InputError(f"AdamW: betas is {short(betas)}; it must be two numbers of at least 0 and below 1, such "
                             "as (0.9, 0.999)")
        if group["moments"] not in MOMENTS:
            raise InputError(f"AdamW: moments is {group['moments']!r}; it must be one of {', '.join(MOMENTS)}")


class SGD(FlatOptimizer):
    """SGD with momentum or Nesterov momentum as in ``torch.optim.SGD``, but with decoupled weight decay.

    A decay that is added to the gradient, torch's way, is worth the same at constant lr and momentum 0 only.
    """

    _moment_names = ("momentum_buffer",)
    _refused_on_load = ("dampening", "maximize")

    def __init__(self, params: Parameters, lr: float, momentum: float = 0.0, nesterov: bool = False,
                 weight_decay: float = 0.0, *, moments: str = "fp32") -> None:
        # torch's SGD wants a dampening in a state it loads
        super().__init__(params, {"lr": lr, "momentum": momentum, "dampening": 0.0, "nesterov": nesterov,
                                  "weight_decay": weight_decay, "decoupled_weight_decay": True, "moments": moments})

    def _update(self, group: dict[str, Any], flat: Buffer, part: slice, done: int, scale: Tensor | None) -> None:
        buffer = flat.moment("momentum_buffer")[part] if group["momentum"] else None
        sgd_(flat.data[part], flat.grad[part], buffer, lr=group["lr"], momentum=group["momentum"],
             nesterov=group["nesterov"], weight_decay=group["weight_decay"], first=done == 0, grad_scale=scale)

    def _show_state(self, group: dict[str, Any], flat: Buffer, i: int) -> None:
        if group["momentum"]:
            self.state[flat.params[i]] = {**flat.state("momentum_buffer", i)}

    def _check_group(self, group: dict[str, Any]) -> None:
        check_at_least_zero("SGD", lr=group["lr"], momentum=group["momentum"], weight_decay=group["weight_decay"])
        if group["momentum"] >= 1:
            raise InputError(f"SGD: momentum is {group['momentum']!r}; it must be below 1")
        if group["nesterov"] and not group["momentum"]:
            raise InputError("SGD: nesterov is True with momentum 0; it needs a momentum above 0")
        if group["moments"] != "fp32":
            raise InputError(f"SGD: moments is {group['moments']!r}; it keeps its momentum in fp32 only (AdamW can "
                             "keep its moments in 8 bits)")


def clip_grad_norm(target: torch.optim.Optimizer | Iterable[Tensor], max_norm: float | None,
                   loss: Tensor | None = None) -> Tensor:
    """Clip to a global norm; returns the norm before (fp32, 0-dim). No host synchronisation, bitwise repeatable.

    minitune's optimizers fold the factor into their next step, which changes nothing where the norm is not finite; for
    another optimizer, or for plain parameters, the gradients are scaled in place (by NaN, if it is not finite).
    `max_norm` None or 0 scales nothing. A `loss` (0-dim) that is not finite counts like such a norm (`clip_gradients`).
    """
    check_max_norm(max_norm)
    if isinstance(target, FlatOptimizer):
        return target.clip(max_norm, loss)
    if isinstance(target, torch.optim.Optimizer):
        return clip_gradients([p for group in target.param_groups for p in group["params"]], max_norm,
                              loss)
    return clip_gradients(target, max_norm, loss)


def _flatten(group: dict[str, Any]) -> list[Buffer]:
    """The group's buffers."""
    params = group["params"]
    names = group.get("param_names") or [f"parameter {i} {list(p.shape)}" for i, p in enumerate(params)]
    return buffers_of(params, names, group.get("moments") == "8bit")


def check_max_norm(max_norm: float | None) -> None:
    if max_norm is not None and not (is_number(max_norm) and max_norm >= 0):
        raise InputError(f"clip: max_norm is {short(max_norm)}; it must be a number of at least 0, or None")
