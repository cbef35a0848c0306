"""Cases of the conformance suite, and inputs from a seed: every rank can build everyone's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, wraps
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from ..settings import Settings

#: The backends that every conformance test runs on. A backend joins by one line.
BACKENDS = (
    "shm",
    "collective",
    "hybrid",
)


def settings_for(backend: str, rank: int, num_ranks: int) -> Settings:
    """The environment's. Where it names no domain, ranks of ``hybrid`` play two hosts, or where their number is odd
    hosts of one rank each."""
    settings = Settings.from_env()
    if backend != "hybrid" or settings.domain:
        return settings
    size = num_ranks // 2 if num_ranks % 2 == 0 else 1
    return replace(settings, domain=f"host {rank // size}")


def domain_size(buffer: Any) -> int:
    """Ranks of each domain where rows take two hops, else 0."""
    info = buffer.backend_info()
    return len(info.scaleup_ranks) if info.num_hops == 2 else 0


#: Dtypes that combine adds up; every other dtype is an opaque payload of dispatch.
REDUCIBLE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

P = ParamSpec("P")
T = TypeVar("T")

Routing = Literal["distinct", "masked", "duplicates", "one_expert", "none"]
Gaps = Literal["", "elements", "rows"]
SCALES = {"f32": torch.float32, "i32": torch.int32}


def computed_once(maxsize: int) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A cache; ranks that are threads wait for one computation instead of each making its own."""

    def decorate(fn: Callable[P, T]) -> Callable[P, T]:
        cached, lock = lru_cache(maxsize=maxsize)(fn), threading.RLock()

        @wraps(fn)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            with lock:
                return cached(*args, **kwargs)  # type: ignore[arg-type]

        return call

    return decorate


@dataclass(frozen=True)
class Case:
    """One problem: a world, its token counts, the shape of a row, a routing, dtypes, strides.

    Attributes:
        num_tokens: T of each rank; its length is the world's size.
        routing: ``distinct`` experts per token; ``masked``: the same, about a third of the slots -1; ``duplicates``:
            slots drawn from three experts with repetition; ``one_expert``: one slot holds the last expert, the rest
            is -1; ``none``: all -1. Where K > E, ``distinct`` leaves -1 in K - E slots.
        dtype: of x. y and bias have it too where it can be added up, else bfloat16.
        sf: "" or the scale factors' dtype, a key of ``SCALES``; ``num_scales`` of them per row.
        gaps: "" for contiguous inputs; ``elements``: every input is a view with gaps between elements and between rows;
            ``rows``: a view whose rows are dense, with gaps between them, which reaches the backends without a copy.
    """

    num_tokens: tuple[int, ...]
    hidden: int = 64
    num_topk: int = 8
    num_experts: int = 16
    routing: Routing = "masked"
    dtype: torch.dtype = torch.bfloat16
    sf: str = ""
    num_scales: int = 3
    gaps: Gaps = ""
    expert_alignment: int = 1
    seed: int = 0

    @property
    def num_ranks(self) -> int:
        return len(self.num_tokens)

    @property
    def num_max_tokens_per_rank(self) -> int:
        """M: more than any rank has, so that it cannot be mistaken for a token count."""
        return max(self.num_tokens) + 3

    @property
    def row_dtype(self) -> torch.dtype:
        return self.dtype if self.dtype in REDUCIBLE else torch.bfloat16

    @property
    def id(self) -> str:
        """For example ``R2-T4095+1-H7168-K8-E256-masked-bfloat16``."""
        tokens = "+".join(map(str, self.num_tokens))
        words = [f"R{self.num_ranks}", f"T{tokens}", f"H{self.hidden}", f"K{self.num_topk}", f"E{self.num_experts}"]
        words += [self.routing, str(self.dtype).removeprefix("torch.")]
        words += [f"sf_{self.sf}x{self.num_scales}"] if self.sf else []
        words += [f"gaps_{self.gaps}"] if self.gaps else []
        words += [f"align{self.expert_alignment}"] if self.expert_alignment != 1 else []
        words += [f"seed{self.seed}"] if self.seed else []
        return "-".join(words)


@dataclass(frozen=True)
class Inputs:
    """One rank's inputs. Weights of empty slots are not 0, so that masking shows.

    x [T, H]; sf [T, S] or None; topk_idx [T, K] int64; topk_weights [T, K] float32; bias: two [T, H].
    """

    x: Tensor
    sf: Tensor | None
    topk_idx: Tensor
    topk_weights: Tensor
    bias: tuple[Tensor, Tensor]


@computed_once(maxsize=4)
def make_inputs(case: Case) -> tuple[Inputs, ...]:
    """The inputs of every rank. Cached: do not write to them."""
    return tuple(_inputs_of_rank(case, rank) for rank in range(case.num_ranks))


def make_rows(case: Case, rank: int, num_rows: int, *, salt: int = 0) -> Tensor:
    """[num_rows, H] of ``case.row_dtype``: what ``rank`` hands to combine; see :func:`order_sensitive`."""
    generator = _generator(case, rank, 1000 + salt)
    rows = order_sensitive((num_rows, case.hidden), case.row_dtype, generator)
    return with_gaps(rows, case.gaps)


def make_weights(case: Case, rank: int, shape: Sequence[int], *, salt: int = 0) -> Tensor:
    """float32 of ``shape``: the weights that ``rank`` hands to combine, sensitive to the order of addition too."""
    return order_sensitive(tuple(shape), torch.float32, _generator(case, rank, 2000 + salt))


def order_sensitive(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Rows whose sum shows the order of addition, and where it was rounded.

    Most elements are +big or -big, the rest small: big swallows small in the accumulator, so ``big - big + small``
    differs from ``big + small - big``. Some bigs are one unit in the last place larger, so that big + big is exact in
    the accumulator and not in a narrower row dtype. Random bfloat16 rows would hide a wrong order.
    """
    big, small = {torch.float64: (2.0**57, 1.0), torch.float16: (1024.0, 2.0**-17)}.get(dtype, (2.0**27, 1.0))
    noise = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    kind = torch.randint(0, 16, shape, generator=generator, dtype=torch.int64, device="cpu")
    large = torch.where(kind % 2 == 0, 1.0, -1.0).to(torch.float64) * big
    large = torch.where(kind < 2, large * (1 + torch.finfo(dtype).eps), large)
    return torch.where(kind < 11, large, noise * small).to(dtype)


def random_payload(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Every bit pattern that ``dtype`` has (NaN and -0.0 among them), since dispatch moves bytes; bool: 0 and 1."""
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8, device="cpu").to(torch.bool)
    num_bytes = (*shape[:-1], shape[-1] * dtype.itemsize)
    raw = torch.randint(0, 256, num_bytes, generator=generator, dtype=torch.uint8, device="cpu")
    return raw.view(dtype)


def route(routing: Routing, num_tokens: int, num_topk: int, num_experts: int, generator: torch.Generator) -> Tensor:
    """[T, K] int64 expert ids or -1; see :class:`Case`."""
    where = {"generator": generator, "device": "cpu"}
    out = torch.full((num_tokens, num_topk), -1, dtype=torch.int64, device="cpu")
    if routing in ("distinct", "masked"):
        picks = torch.rand((num_tokens, num_experts), dtype=torch.float32, **where).argsort(dim=1)[:, :num_topk]  # type: ignore[call-overload]
        out[:, : picks.shape[1]] = picks
        if routing == "masked":
            out[torch.rand(out.shape, dtype=torch.float32, **where) < 0.3] = -1  # type: ignore[call-overload]
    elif routing == "duplicates":
        few = torch.randint(0, num_experts, (3,), dtype=torch.int64, **where)  # type: ignore[call-overload]
        out = few[torch.randint(0, 3, out.shape, dtype=torch.int64, **where)]  # type: ignore[call-overload]
    elif routing == "one_expert":
        out[:, num_topk // 2] = num_experts - 1
    return out


def _inputs_of_rank(case: Case, rank: int) -> Inputs:
    generator = _generator(case, rank, 0)
    num_tokens = case.num_tokens[rank]
    topk_idx = route(case.routing, num_tokens, case.num_topk, case.num_experts, generator)
    x = random_payload((num_tokens, case.hidden), case.dtype, generator)
    sf = random_payload((num_tokens, case.num_scales), SCALES[case.sf], generator) if case.sf else None
    weights = torch.rand((num_tokens, case.num_topk), generator=generator, dtype=torch.float32, device="cpu") + 0.5
    bias = [order_sensitive((num_tokens, case.hidden), case.row_dtype, generator) for _ in range(2)]
    x, topk_idx, weights, *bias = (with_gaps(t, case.gaps) for t in (x, topk_idx, weights, *bias))
    if sf is not None:  # quantisation kernels leave them column-major
        sf = sf.t().contiguous().t() if case.gaps == "elements" else with_gaps(sf, case.gaps)
    return Inputs(x, sf, topk_idx, weights, (bias[0], bias[1]))


def with_gaps(x: Tensor, gaps: Gaps) -> Tensor:
    """The values of ``x`` [N, W] as a view of another tensor, whose other elements have all bits set; see
    :class:`Case`."""
    if not gaps:
        return x
    (num_rows, width), step = x.shape, 2 if gaps == "elements" else 1
    rows, columns = slice(None, None, 2), slice(1, 1 + step * width, step)
    num_bytes = (2 * num_rows, (step * width + 3) * x.dtype.itemsize)
    base = torch.full(num_bytes, 255, dtype=torch.uint8, device="cpu").view(x.dtype)
    # As bytes: not every dtype of eight bits can be assigned to an index.
    written, values = (t.view(torch.uint8) if x.dtype.itemsize == 1 else t for t in (base, x))
    written[rows, columns] = values
    return base[rows, columns]


def _generator(case: Case, rank: int, salt: int) -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(case.seed * 1_000_003 + salt * 101 + rank)
