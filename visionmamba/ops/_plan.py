"""Plans: what a call of an operator does, written down once and done again without the Python that decided it.

On a GPU a small call waits for Python: shapes are checked, a backend and a tiling are chosen, structs are laid out. All
of that follows from the arguments' signature: shapes, strides, dtypes, devices, how addresses are aligned, and what is
no tensor. So one call of a signature is watched, PyTorch's operators by a dispatch mode and this package's kernels by
:func:`~visionmamba.ops.cuda_runtime.watch_launches`, and written down as straight Python::

    def plan(x0, x1, x2):
        t0 = empty([128, 196, 384], ...)
        launch0(x0.data_ptr(), x1.data_ptr() + 768, t0.data_ptr())
        t1 = mm(t0, x1)
        del t0
        return t1

Views that only a kernel reads become an offset to an address. The first calls of a signature are not watched. They fill
caches (index tables, compiled kernels), whose tensors are constants of the plan, being older than it; and being watched
takes a call eight times its time, which sizes that come only a few times would not win back. What cannot be seen from
here (a kernel of Triton's, a value read back) is not planned: the function runs as it stands, every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from .backend import Implementation, state, watch_choices
from .cuda_runtime import Address, Arguments, KernelError, Prepared, watch_launches

__all__ = ["UNWATCHED", "Plans", "forget_plans"]

UNWATCHED = 7
"""Calls of a signature before the one that is watched."""
_MOST_PLANS = 1024  # of an operator; beyond, all are forgotten
_SEEN = ("cuda",)  # backends; Triton's kernels and Numba's are launched unseen
_UNFIT = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded)
_aten = torch.ops.aten
_ALLOCATIONS = (
    _aten.empty.memory_format, _aten.empty_like.default, _aten.empty_strided.default, _aten.new_empty.default,
)  # fmt: skip
_all: list[Plans] = []


class _UnplannableError(Exception):
    """A call does something that a plan cannot do again."""


class _Value:
    """A tensor of a plan: an argument, a constant, or what a line makes.

    Args:
        text: The expression for it.
        tensor: What it is in the call that is watched; not kept.
        line: The line that makes it, if any.
        base: Of a view: what it is a view of, no view itself.
        offset: Of a view: bytes from the base's first element.
    """

    def __init__(
        self, text: str, tensor: Tensor, line: _Line | None = None, base: _Value | None = None, offset: int = 0
    ) -> None:
        self.text, self.line, self.base, self.offset = text, line, base, offset
        self.dtype, self.address = tensor.dtype, tensor.data_ptr()
        self.storage_offset = None if line is None else tensor.storage_offset()


class _Line:
    """A line of a plan.

    Args:
        text: ``name(...)``, with the arguments' expressions.
        reads: The values in it.
        result: The variable that takes the result, if there is one.
        needed: Whether it stays even where nothing reads its result.
    """

    def __init__(self, text: str, reads: list[_Value], result: str, needed: bool) -> None:
        self.text, self.reads, self.result, self.needed = text, reads, result, needed

    def need(self) -> None:
        """Keep the line, and what it reads."""
        self.needed = True
        for value in self.reads:
            if value.line is not None and not value.line.needed:
                value.line.need()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


class _Recorder(TorchDispatchMode):
    """Runs a call and writes down what it does.

    Args:
        functions: This package's operators by their overloads; the recorder looks into them.
    """

    def __init__(self, functions: dict[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self._functions = functions
        self._lines: list[_Line] = []
        self._names: dict[str, Any] = {}
        self._values = WeakIdKeyDictionary()  # a tensor that dies must leave its memory

    def record(self, function: Callable[..., Any], inputs: tuple[Any, ...]) -> tuple[Any, Callable[..., Any] | None]:
        """Call a function; return its results, and the plan that computes them if there can be one."""
        parameters, distinct = [], []
        self._device_key = getattr(torch._C.DispatchKey, torch._C._dispatch_key_for_device(inputs[0].device.type))
        for i, value in enumerate(inputs):
            if isinstance(value, Tensor):
                value = value.detach()  # a tensor given twice is two, as it may be in the next call
                self._values[value] = _Value(f"x{i}", value)
            parameters.append(f"x{i}")
            distinct.append(value)
        try:
            with watch_launches(self._launched), watch_choices(self._chosen), self:
                results = function(*distinct)
            returned = [self._value(result) for result in _tensors(results)]
        except _UnplannableError:
            returned = None
        if returned is None:
            return function(*inputs), None
        return results, self._compile(parameters, returned, isinstance(results, Tensor))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self._functions:
            with self:
                return self._functions[func](*args, **kwargs)
        if not func.has_kernel_for_dispatch_key(self._device_key):  # without autograd, composite operators come whole
            with self:
                results = func.decompose(*args, **kwargs)
            if results is not NotImplemented:
                return results
        if any(tag in func.tags for tag in _UNFIT):
            raise _UnplannableError(str(func))
        results = func(*args, **kwargs)
        aliases = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
        if func in _ALLOCATIONS:
            self._allocated(results)
        elif aliases and not any(alias.is_write for alias in aliases):
            for result in _tensors(results):
                self._viewed(next(_tensors(args)), result)
        else:
            self._operated(func, args, kwargs, None if aliases else results)
        return results

    def _line(self, text: str, reads: list[_Value], needed: bool = True, result: bool = True) -> _Line:
        self._lines.append(_Line(text, reads, f"t{len(self._lines)}" if result else "", needed))
        return self._lines[-1]

    def _allocated(self, tensor: Tensor) -> None:
        allocate = partial(torch.empty_strided, tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        line = self._line(f"{self._name('empty', allocate)}()", [], needed=False)
        self._values[tensor] = _Value(line.result, tensor, line)

    def _viewed(self, origin: Tensor, view: Tensor) -> None:
        base = self._value(origin).base or self._value(origin)
        if view.dtype != base.dtype:
            raise _UnplannableError("a view of another dtype")
        offset = view.data_ptr() - base.address if view.numel() else 0
        arguments = [base.text, self._name("size", view.shape), self._name("stride", view.stride())]
        if offset:
            start = f"{base.text}.storage_offset()" if base.storage_offset is None else str(base.storage_offset)
            arguments.append(f"{start} + {offset // view.element_size()}")
        line = self._line(f"{self._name('view', torch.as_strided)}({', '.join(arguments)})", [base], needed=False)
        self._values[view] = _Value(line.result, view, line, base, offset)

    def _operated(self, func: Any, args: Any, kwargs: dict[str, Any], results: Any) -> None:
        reads = [self._value(tensor) for tensor in _tensors([*args, *kwargs.values()])]
        texts = [self._expression(value) for value in args]
        texts += [f"{name}={self._expression(value)}" for name, value in kwargs.items()]
        line = self._line(f"{self._name('operator', func)}({', '.join(texts)})", reads, result=results is not None)
        if isinstance(results, Tensor):
            self._values[results] = _Value(line.result, results, line)
        else:
            for i, result in enumerate(results or ()):
                if not isinstance(result, Tensor):
                    raise _UnplannableError(str(func))
                self._values[result] = _Value(f"{line.result}[{i}]", result, line)

    def _chosen(self, implementation: Implementation) -> None:
        if implementation.backend not in _SEEN:
            raise _UnplannableError(f"{implementation.op} runs on {implementation.backend}")

    def _launched(self, launch: Prepared, arguments: Arguments) -> None:
        fields, reads = [], []
        for field in arguments.wide[: launch.open]:
            if not isinstance(field, Address) or not field.tensor.numel():
                fields.append(str(int(field)))
                continue
            value = self._value(field.tensor)
            reads.append(value.base or value)
            fields.append(f"{reads[-1].text}.data_ptr()" + (f" + {value.offset}" if value.offset else ""))
        self._line(f"{self._name('launch', launch)}({', '.join(fields)})", reads, result=False)

    def _value(self, tensor: Tensor) -> _Value:
        if tensor not in self._values:  # older than the call
            self._values[tensor] = _Value(self._name("constant", tensor), tensor)
        return self._values[tensor]

    def _name(self, kind: str, value: Any) -> str:
        name = f"{kind}{len(self._names)}"
        self._names[name] = value
        return name

    def _expression(self, value: Any) -> str:
        if isinstance(value, Tensor):
            return self._value(value).text
        if isinstance(value, (list, tuple)) and any(True for _ in _tensors(value)):
            return f"[{', '.join(map(self._expression, value))}]"
        return repr(value) if type(value) in (int, bool, type(None)) else self._name("value", value)

    def _compile(self, parameters: list[str], returned: list[_Value], single: bool) -> Callable[..., Any]:
        for value in returned:
            if value.line is not None:
                value.line.need()
        for line in self._lines:
            if line.needed:
                line.need()
        body = _with_deletions([line for line in self._lines if line.needed], returned)
        body.append("return " + (returned[0].text if single else f"({', '.join(v.text for v in returned)},)"))
        source = f"def plan({', '.join(parameters)}):\n" + "\n".join(f"    {text}" for text in body)
        exec(compile(source, "<plan>", "exec"), self._names)
        return self._names["plan"]


def _with_deletions(lines: list[_Line], returned: Iterable[_Value]) -> list[str]:
    """Return the lines' text; a variable is deleted after the last line that reads it."""
    kept = {value.line.result for value in returned if value.line is not None}
    text: list[str] = []
    for line in reversed(lines):
        variables = {value.line.result for value in line.reads if value.line is not None} | {line.result}
        variables -= {""}
        last = sorted(variables - kept)
        if last:
            text.append(f"del {', '.join(last)}")
        kept |= variables
        text.append(f"{line.result} = {line.text}" if line.result else line.text)
    return text[::-1]


class Plans:
    """An operator's plans.

    Args:
        function: What the operator does: PyTorch's operators and this package's launches, by the signature alone.
        functions: All such operators by their overloads.
    """

    def __init__(self, function: Callable[..., Any], functions: dict[Any, Callable[..., Any]]) -> None:
        self._function, self._functions = function, functions
        self._plans: dict[tuple[Any, ...], Callable[..., Any] | int] = {}  # or how often the signature has come
        _all.append(self)

    def __call__(self, *inputs: Any) -> Any:
        """Do what the function does."""
        key = self.signature(inputs)
        plan = self._plans.get(key, 0)
        if isinstance(plan, int):
            if plan < UNWATCHED:
                if len(self._plans) >= _MOST_PLANS:
                    self._plans.clear()
                self._plans[key] = plan + 1
                return self._function(*inputs)
            results, plan = _Recorder(self._functions).record(self._function, inputs)
            self._plans[key] = self._function if plan is None else plan
            return results
        try:
            return plan(*inputs)
        except KernelError:  # the function knows what runs instead
            self._plans.pop(key, None)
            return self._function(*inputs)

    @staticmethod
    def signature(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return all that decides what the function does."""
        key: list[Any] = [state()]
        for value in inputs:
            if isinstance(value, Tensor):
                key.append((value.shape, value.stride(), value.dtype, value.get_device(), value.data_ptr() & 15))
            else:
                key.append(tuple(value) if isinstance(value, list) else value)
        return tuple(key)

    def forget(self) -> None:
        """Make all plans anew."""
        self._plans.clear()


def forget_plans() -> None:
    """Forget every operator's plans, as after a change of how kernels are cut."""
    for plans in _all:
        plans.forget()
