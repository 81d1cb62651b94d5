"""A device of the tests' own, for machines without a GPU: real numbers, kept apart from those of the CPU.

As on a GPU, an operation takes tensors of one side, and the host waits where it asks for a value, or sends one over
unless it says `non_blocking`.
"""
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

AWAY = torch.device('meta') # which every torch knows and nothing else here lives on
aten = torch.ops.aten
ASKS = aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default
MIXED = aten.copy_.default, aten.index.Tensor, aten._index_put_impl_.default # a GPU takes both sides, but waits
INDEXING = torch.Tensor.__getitem__, torch.Tensor.__setitem__

class Away(torch.Tensor):
    "A tensor on that device; `here` is what it holds"
    @staticmethod
    def __new__(cls, here):
        return torch.Tensor._make_wrapper_subclass(cls, here.shape, here.stride(), here.storage_offset(),
                                                   dtype=here.dtype, device=AWAY)
    def __init__(self, here): self.here = here
    @classmethod
    def __torch_dispatch__(cls, f, *_): raise AssertionError(f'{f} on a tensor that outlived its device')

class _Lists(TorchFunctionMode): # From and to Python's numbers, which are no operations
    def __torch_function__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if f is torch.Tensor.tolist: return f(args[0].cpu())
        if f in INDEXING and isinstance(args[0], Away): # a list among the indices is sent over
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = args[0], tuple(torch.tensor(i).to(AWAY) if isinstance(i, list) else i for i in index), *args[2:]
        away = f is torch.tensor and torch.device(kwargs.get('device') or 'cpu') == AWAY
        return f(*args, **kwargs | dict(device='cpu')).to(AWAY) if away else f(*args, **kwargs)

def tensors_of(value):
    "The tensors in nested lists; torch's `tree_iter` takes twice as long"
    if isinstance(value, torch.Tensor): yield value
    elif isinstance(value, (list, tuple)):
        for v in value: yield from tensors_of(v)

def mapped(value, kind, f):
    "`value` with each tensor of a kind replaced"
    if isinstance(value, kind): return f(value)
    return type(value)([mapped(v, kind, f) for v in value]) if isinstance(value, (list, tuple)) else value

class Elsewhere(TorchDispatchMode):
    "The device is there inside of this; `waits` are the operations for which the host waited"
    def __init__(self, note=str): super().__init__(); self.waits, self.lists, self.note = [], _Lists(), note
    def __enter__(self): self.lists.__enter__(); return super().__enter__()
    def __exit__(self, *e): super().__exit__(*e); self.lists.__exit__(*e)

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [*tensors_of(args), *tensors_of([*kwargs.values()])]
        away = any(isinstance(t, Away) for t in tensors)
        mixed = away and not all(isinstance(t, Away) or t.ndim == 0 for t in tensors)
        if mixed and f not in MIXED: raise RuntimeError(f'{f}: some of its tensors are on another device')
        there = away if kwargs.get('device') is None else kwargs['device'] == AWAY
        over = tensors and away != there and not (there and kwargs.get('non_blocking')) # the bus
        if mixed or away and f in ASKS or over: self.waits.append(self.note(f))
        if 'device' in kwargs: kwargs['device'] = torch.device('cpu')
        here = lambda value: mapped(value, Away, lambda t: t.here)
        out = f(*here(args), **{k: here(v) for k, v in kwargs.items()})
        if not there: return out
        return return_and_correct_aliasing(f, args, kwargs, mapped(out, torch.Tensor, Away))
