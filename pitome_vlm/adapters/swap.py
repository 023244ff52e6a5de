"""Give one module another class, and take it back.

A class swap is the mechanism because the alternatives fail: hooks cannot run between attention and
MLP, closures on the instance are lost by accelerate and copied wrongly by deepcopy, and renamed
classes break hidden-state capture and `config.architectures`.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import nn

# The attribute of a swapped class that holds the class of the module as it was.
BASE = "_pitome_base"


@functools.cache
def swapped_class(base: Any, mixin: Any) -> type[nn.Module]:
    """`base` with `mixin` before it, under the same name, module and qualified name.

    The names matter: transformers keys its output recording by `str(class)`, writes the class
    name into `config.architectures`, and device maps name classes that must not be split.
    """
    body = {"__module__": base.__module__, "__qualname__": base.__qualname__, BASE: base}
    body["__doc__"] = base.__doc__ or ""
    body["__reduce_ex__"] = _reduce_swapped
    for method in getattr(mixin, "_pitome_mirrored", ()):
        body[method] = _mirrored(getattr(base, method), getattr(mixin, method))
    return type(base.__name__, (mixin, base), body)


def _mirrored(original: Any, replacement: Any) -> Any:
    """`replacement` under the name, docs and signature of `original`, which callers inspect."""
    # A copy and no function around it: some of these run for every decoded token.
    method = types.FunctionType(
        replacement.__code__,
        replacement.__globals__,
        replacement.__name__,
        replacement.__defaults__,
        replacement.__closure__,
    )
    method.__kwdefaults__ = replacement.__kwdefaults__
    functools.update_wrapper(method, original)
    method.__signature__ = _with_added(original, replacement)  # type: ignore[attr-defined]
    return method


def _with_added(original: Any, replacement: Any) -> inspect.Signature:
    """The signature of `original` with the keyword-only parameters that `replacement` adds."""
    signature = inspect.signature(original)
    added = [
        parameter
        for parameter in inspect.signature(replacement).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    own = list(signature.parameters.values())
    end = len(own) - sum(parameter.kind is parameter.VAR_KEYWORD for parameter in own)
    return signature.replace(parameters=own[:end] + added + own[end:])


def _reduce_swapped(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Pickle (and deepcopy) through the two classes that can be imported by name."""
    del protocol
    cls = type(self)
    return _restore, (getattr(cls, BASE), cls.__bases__[0]), self.__dict__.copy()


def _restore(base: Any, mixin: Any) -> nn.Module:
    cls = swapped_class(base, mixin)
    module: nn.Module = cls.__new__(cls)
    return module


def is_swapped(module: nn.Module) -> bool:
    """Whether this instance carries a swapped class, or one that a library derived from it."""
    return hasattr(type(module), BASE)


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module as it was before any swap."""
    base: type[nn.Module] = getattr(type(module), BASE, type(module))
    return base


def _without_swap(cls: Any) -> Any:
    """A class as it would be without the swap: FSDP2 derives one of its own from a swapped one."""
    if BASE in cls.__dict__:
        return cls.__dict__[BASE]
    bases = tuple(_without_swap(one) if hasattr(one, BASE) else one for one in cls.__bases__)
    # transformers gives every class of a layer a forward around that of its base.
    own = {"__dict__", "__weakref__", "forward"}
    body = {name: value for name, value in vars(cls).items() if name not in own}
    return type(cls)(cls.__name__, bases, body)


def own_forward(module: Any, mixin: Any) -> Callable[..., Any]:
    """The forward of a module without a mixin.

    Also where the module was unwrapped while another library held on to the mixin's own.
    """
    if is_swapped(module):
        found: Callable[..., Any] = super(mixin, module).forward
        return found
    return functools.partial(type(module).forward, module)


def swap_in(module: nn.Module, mixin: Any) -> None:
    """Put `mixin` before the class of this one instance.

    Raises:
        RuntimeError: something else replaced `forward` on the instance, so that a new class would
            never be called; nothing has been changed then.
    """
    if not is_swapped(module):
        base: Any = type(module)
        new = swapped_class(base, mixin)
        _refuse_foreign(module, new)
        _exchange(module, new)


def swap_out(module: nn.Module) -> None:
    """Undo `swap_in`; a no-op on a module that is not swapped.

    A `forward` that something else has put on the instance meanwhile stays: methods of the mixin
    that it may hold pass calls on to the class of the module.
    """
    if is_swapped(module):
        _exchange(module, _without_swap(type(module)))


def _exchange(module: nn.Module, new: type[nn.Module]) -> None:
    own, old = module.__dict__, type(module)
    name = _own_forward(module)
    if new.forward is not old.forward and name and _is_method(own[name], old.forward):
        if name == "_old_forward":
            # accelerate's hooks keep the real forward here and call it.
            own[name] = types.MethodType(new.forward, module)
        else:
            # transformers 4.57 leaves the class's own bound forward on instances after recording
            # hidden states; it only hides the class, so it is removed.
            del own[name]
    module.__class__ = new


def _own_forward(module: nn.Module) -> str | None:
    """The attribute of the instance by which its forward was replaced, None without one."""
    return next((name for name in ("_old_forward", "forward") if name in module.__dict__), None)


def _is_method(value: Any, function: Any) -> bool:
    return getattr(value, "__func__", None) is function


def _refuse_foreign(module: nn.Module, new: type[nn.Module]) -> None:
    name, old = _own_forward(module), type(module)
    if name and new.forward is not old.forward:
        if _is_method(module.__dict__[name], old.forward):
            return
        raise RuntimeError(
            f"{old.__name__}.forward was replaced on this instance by another library, so merging "
            "cannot be installed; remove that patch, wrap, then apply it again"
        )
