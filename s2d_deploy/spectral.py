"""The leading singular triplets of a layer's weight.

A Linear weight is the matrix [N, K] it is; a Conv weight [O, I / groups, *kernel] is read as
[O, I / groups * prod(kernel)], the matrix that multiplies one unfolded patch; transformers' Conv1D stores
[K, N] and is read transposed. A fused projection may be read as several matrices, equal shares of its rows
(`Part`). Sharded weights (DTensor) are gathered whole.

With W = U S V^T, S2D needs only the top few triplets, so `top_triplets` runs a restarted block Krylov
iteration, warm-started by the last V, and accepts its answer on two measured facts: the residual of every
triplet, and a Cholesky factorization which proves that no larger singular value was missed. Where either
fails, the full SVD answers. `refreshed_triplets` is its cheap sister for the refreshes in between: all matrices of
one shape in one batch, a looser residual (`REFRESH_RESIDUAL`), no proof; the random columns of every start still
find a triplet that the warm start knows nothing of. Nothing is lost but time; a singular *vector* is only as
exact as residual / gap, so nearly equal singular values give vectors that may mix among themselves.

Source of the iteration: Musco and Musco, "Randomized block Krylov methods", arXiv 1504.05477, algorithm 2.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from s2d_deploy.errors import ModelError, RecipeError, message

# Below this size the full SVD takes a few tens of milliseconds at most, and is exact.
SMALL = 256
OVERSAMPLE = 5
DEPTH = 6
MAX_RESTARTS = 12
# ||W^T u - s v|| <= RESIDUAL * s_1. An FP32 product of this length already errs by about 2e-6 * s_1.
RESIDUAL = 1e-5
# The same at a refresh. s errs by its square over the gap: measured 5e-4 * s_1 at worst, on flat random spectra, which
# S2D does not flag; a dominant triplet converges far below it.
REFRESH_RESIDUAL = 5e-3
REFRESH_DEPTH = 3
# Matrices of one shape are stacked for one call up to this size; more go in several calls.
BATCH_BYTES = 64 * 2**20
# A missed singular value may exceed s_k by this share: the margin over the FP32 rounding of the certificate.
MARGIN = 1e-3

# transformers' Conv1D belongs to it as well, but has no type here: the package is not imported for its sake.
WeightedLayer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
LAYER_TYPES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, slots=True)
class Triplets:
    """The k largest singular triplets, ``W ~ U diag(S) V^T``, S descending.

    Attributes:
        U: float32 [N, k], orthonormal columns.
        S: float32 [k].
        V: float32 [K, k], orthonormal columns.
    """

    U: Tensor
    S: Tensor
    V: Tensor

    def top(self, k: int) -> Triplets:
        """The first `k` of them."""
        return Triplets(self.U[:, :k], self.S[:k], self.V[:, :k])

    def product(self, power: float = 1.0) -> Tensor:
        """``U S^power V^T``, float32 [N, K]."""
        return (self.U * self.S.pow(power)) @ self.V.T


def weighted_layers(model: nn.Module, layers: list[str] | None = None) -> dict[str, WeightedLayer]:
    """The Linear and Conv modules of `model` by module path, in model order.

    Args:
        model: any module.
        layers: only these; None takes all.

    Raises:
        ModelError: a name in `layers` is no Linear or Conv of the model. All such names are listed.
    """
    found: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LAYER_TYPES) or is_transposed(module)
    }
    if layers is None:
        return found
    unknown = [name for name in layers if name not in found]
    if unknown:
        raise ModelError(
            message(
                f"no Linear or Conv layer called {', '.join(repr(n) for n in unknown)}",
                expected="module paths as in model.named_modules()",
                found=f"{len(found)} such layers, e.g. {', '.join(list(found)[:3]) or 'none'}",
            )
        )
    return {name: found[name] for name in found if name in set(layers)}


def is_transposed(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D: a linear layer that stores its weight as [K, N]."""
    home = sys.modules.get("transformers.pytorch_utils")  # not loaded: then no such layer exists
    return home is not None and isinstance(module, home.Conv1D)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of it where it is sharded (DTensor). Collective: every process must call it."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def weight_matrix(layer: WeightedLayer) -> Tensor:
    """The layer's weight as a detached float32 matrix [N, K]; Conv: [O, I / groups * prod(kernel)]."""
    return as_matrix(layer, whole(layer.weight.detach())).float()


def as_matrix(layer: nn.Module, weight: Tensor) -> Tensor:
    """`weight`, in the layout of the layer, as [N, K]; a view where the memory allows it."""
    return weight.T if is_transposed(layer) else weight.flatten(1)


def as_weight(layer: nn.Module, matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """The reverse of `as_matrix`: [N, K] in the layout of the layer."""
    return matrix.T if is_transposed(layer) else matrix.reshape(*shape)


@dataclass(frozen=True, slots=True)
class Part:
    """One matrix that is decomposed by itself: the whole weight of a layer, or an equal share of its rows.

    Attributes:
        layer: module path.
        index: which share, from 0.
        count: of how many; 1 is the whole.
    """

    layer: str
    index: int = 0
    count: int = 1

    @property
    def name(self) -> str:
        """The module path; with the share where there are several, e.g. ``"blocks.0.attn.qkv[1/3]"``."""
        return self.layer if self.count == 1 else f"{self.layer}[{self.index}/{self.count}]"

    def rows(self, length: int) -> slice:
        """Its rows of a matrix with `length` rows."""
        size = length // self.count
        return slice(self.index * size, (self.index + 1) * size)


def parts_of(layers: Mapping[str, WeightedLayer], split: Mapping[str, int]) -> list[Part]:
    """The matrices that `layers` are read as.

    Args:
        layers: by module path.
        split: pattern of module paths (fnmatch) -> number of equal shares of the output rows: 3 for a fused qkv, 3 x
            heads for each head by itself. The first pattern that matches counts; no match: whole.

    Raises:
        RecipeError: a pattern matches no layer.
        ModelError: rows that cannot be shared out equally. Every such layer is named.
    """
    idle = [pattern for pattern in split if not any(fnmatchcase(name, pattern) for name in layers)]
    if idle:
        raise RecipeError(
            message(
                f"split: {', '.join(repr(p) for p in idle)} matches no layer",
                expected=f"a pattern for one of {len(layers)} layers such as {', '.join(list(layers)[:3]) or 'none'}",
                fix="see `s2d-deploy diagnose` for the names",
            )
        )
    counts = {name: next((c for p, c in split.items() if fnmatchcase(name, p)), 1) for name in layers}
    widths = {name: _rows(layer) for name, layer in layers.items()}
    odd = [f"{name} ({widths[name]} rows, {count} parts)" for name, count in counts.items() if widths[name] % count]
    if odd:
        raise ModelError(
            message(
                f"split: rows cannot be shared out equally in {', '.join(odd)}",
                expected="a divisor of the number of output rows",
                fix="3 for a fused qkv, 3 x heads for its heads",
            )
        )
    return [Part(name, index, count) for name, count in counts.items() for index in range(count)]


def _rows(layer: WeightedLayer) -> int:
    return int(layer.weight.shape[1 if is_transposed(layer) else 0])


def require_finite_weights(layers: dict[str, WeightedLayer]) -> None:
    """Check every weight.

    Raises:
        ModelError: names every layer whose weight holds NaN or infinity.
    """
    broken = [name for name, layer in layers.items() if not bool(torch.isfinite(whole(layer.weight)).all())]
    if broken:
        raise ModelError(
            message(
                f"NaN or infinity in the weight of {', '.join(repr(n) for n in broken)}",
                expected="finite weights",
                fix="take an earlier checkpoint: this one's training diverged",
            )
        )


def singular_values(weight: Tensor) -> Tensor:
    """All singular values, descending: [N, K] -> float32 [min(N, K)]."""
    _require_matrix(weight)
    values: Tensor = torch.linalg.svdvals(weight.detach().float())
    return values


def top_triplets(weight: Tensor, k: int, *, warm: Tensor | None = None) -> Triplets:
    """The `k` largest singular triplets of `weight`.

    Args:
        weight: [N, K], any float dtype; computed in float32.
        k: how many; at most min(N, K) are returned.
        warm: [K, j], right singular vectors of an earlier state of this weight. Only speeds things up:
            the answer is checked the same way.

    Raises:
        ModelError: not a matrix, or not finite.
    """
    _require_matrix(weight)
    w = weight.detach().float()
    k = max(1, min(k, *w.shape))
    if _iterable(w, k):
        found = _block_krylov(w[None], k, None if warm is None else [warm], RESIDUAL, DEPTH)[0]
        if found is not None and is_leading(w, found):
            return found
    return _by_svd(w, k)


def refreshed_triplets(weights: Sequence[Tensor], k: int, warm: Sequence[Tensor | None]) -> list[Triplets]:
    """The `k` largest triplets of many matrices, warm-started, matrices of one shape and device together.

    Cheaper than `top_triplets` and less exact: a residual of `REFRESH_RESIDUAL` * s_1, and no proof that nothing was
    missed. Matrices without a warm start, and those that do not converge, get `top_triplets`.

    Args:
        weights: [N, K] each, any float dtype; computed in float32.
        k: how many; at most min(N, K) are returned.
        warm: for each [K, j], right singular vectors of its earlier state, or None.

    Raises:
        ModelError: not a matrix, or not finite.
    """
    result: list[Triplets | None] = [None] * len(weights)
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, weight in enumerate(weights):
        if warm[index] is not None and _iterable(weight, k):
            groups.setdefault((tuple(weight.shape), weight.device), []).append(index)
    for (shape, _), members in groups.items():
        room = max(1, BATCH_BYTES // (4 * shape[0] * shape[1]))
        for start in range(0, len(members), room):
            chosen = members[start : start + room]
            stack = torch.stack([weights[i].detach().float() for i in chosen])
            if bool(torch.isfinite(stack).all()):
                starts = [v for i in chosen if (v := warm[i]) is not None]
                found = _block_krylov(stack, k, starts, REFRESH_RESIDUAL, REFRESH_DEPTH)
                for i, triplets in zip(chosen, found, strict=True):
                    result[i] = triplets
    return [
        top_triplets(weight, k, warm=start) if triplets is None else triplets
        for weight, start, triplets in zip(weights, warm, result, strict=True)
    ]


def residual(weight: Tensor, triplets: Triplets) -> float:
    """How far `triplets` are from being triplets of `weight`: both sides' errors, over the norm of S.

    ``max(||W V - U S||_F, ||W^T U - V S||_F) / ||S||``. For triplets of an earlier state of the weight this is
    their drift: 0 when nothing changed, about 1 when they no longer describe the weight.
    """
    w = weight.detach().float()
    size = float(triplets.S.norm())
    if size == 0.0:
        return 0.0 if not bool(w.any()) else 1.0
    left = float((w @ triplets.V - triplets.U * triplets.S).norm())
    right = float((w.T @ triplets.U - triplets.V * triplets.S).norm())
    return max(left, right) / size


def is_leading(weight: Tensor, triplets: Triplets) -> bool:
    """Whether no singular value outside `triplets` exceeds their smallest by more than `MARGIN`.

    A proof, not an estimate: ``(s_k (1 + MARGIN))^2 I - D D^T`` with the deflated ``D = W - U S V^T`` has a
    Cholesky factorization exactly when the largest singular value of D is smaller.
    """
    w = weight.detach().float()
    bound = float(triplets.S[-1]) * (1 + MARGIN)
    if bound <= 0.0:
        return False
    deflated = (w - triplets.product()) / bound
    gram = deflated @ deflated.T if w.shape[0] <= w.shape[1] else deflated.T @ deflated
    identity = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    _, info = torch.linalg.cholesky_ex(identity - gram)
    return int(info) == 0


def _iterable(w: Tensor, k: int) -> bool:
    """Whether the matrix is so large that the iteration pays."""
    return w.dim() == 2 and min(w.shape) > max(SMALL, DEPTH * (k + OVERSAMPLE))


def _by_svd(w: Tensor, k: int) -> Triplets:
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    return Triplets(u[:, :k].contiguous(), s[:k].contiguous(), vh[:k].T.contiguous())


def _block_krylov(
    w: Tensor, k: int, warm: Sequence[Tensor] | None, tolerance: float, depth: int
) -> list[Triplets | None]:
    """Restarted block Krylov iteration on W^T W for a stack [B, N, K]; None where the residual stays too large."""
    flipped = w.shape[1] < w.shape[2]  # the blocks live on the shorter side
    batch, width, side = w.shape[0], k + OVERSAMPLE, min(w.shape[1:])
    # Random columns see every direction, so that a triplet which the warm start knows nothing of can appear.
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(side, width, generator=generator).to(w.device).repeat(batch, 1, 1)
    if warm is not None:
        known = min(k, *(v.shape[1] for v in warm))
        start = torch.stack([v[:, :known].to(block) for v in warm])
        block[:, :, :known] = w @ start if flipped else start
        # Columns of one length: a start that is far larger than the random columns would hide them.
        block[:, :, :known] *= side**0.5 / block[:, :, :known].norm(dim=1, keepdim=True).clamp_min(1e-30)
    result: list[Triplets | None] = [None] * batch
    active = list(range(batch))
    for _ in range(MAX_RESTARTS):
        left, s, right = _rayleigh_ritz(w, flipped, block, depth)
        block = right
        u, s, v = left[:, :, :k], s[:, :k], right[:, :, :k]
        error = (_apply(w, not flipped, u) - v * s[:, None]).norm(dim=1).amax(dim=1)
        good = (error <= tolerance * s[:, 0]).tolist()
        for place, index in enumerate(active):
            if good[place]:
                sides = (u[place].contiguous(), v[place].contiguous())
                result[index] = Triplets(sides[flipped], s[place].contiguous(), sides[not flipped])
        rest = [place for place, done in enumerate(good) if not done]
        if not rest:
            break
        if len(rest) < len(active):
            w, block, active = w[rest], block[rest], [active[place] for place in rest]
    return result


def _apply(w: Tensor, transposed: bool, x: Tensor) -> Tensor:
    """``W x`` or ``W^T x`` for a stack; the thin factor's transpose, because CPU libraries are slow at W^T x."""
    return (x.transpose(1, 2) @ w).transpose(1, 2) if transposed else w @ x


def _rayleigh_ritz(w: Tensor, flipped: bool, block: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best triplets of W (`flipped`: of W^T) in the Krylov space of `block`, as many as it has columns."""
    width = block.shape[2]
    newest = torch.linalg.qr(block).Q
    basis, images = newest, [_apply(w, flipped, newest)]
    for _ in range(depth - 1):
        newest = _apply(w, not flipped, images[-1])
        for _ in range(2):  # once is not enough in FP32: the rest is of the size of its rounding error
            newest = newest - basis @ (basis.transpose(1, 2) @ newest)
        newest = torch.linalg.qr(newest).Q
        basis = torch.cat([basis, newest], dim=2)
        images.append(_apply(w, flipped, newest))
    q, r = torch.linalg.qr(torch.cat(images, dim=2))
    u, s, rh = torch.linalg.svd(r, full_matrices=False)  # of a small square
    return q @ u[:, :, :width], s[:, :width], basis @ rh.transpose(1, 2)[:, :, :width]


def _require_matrix(weight: Tensor) -> None:
    if weight.dim() != 2 or 0 in weight.shape:
        raise ModelError(message("not a weight matrix", expected="[N, K]", found=f"shape {list(weight.shape)}"))
    if not bool(torch.isfinite(weight).all()):
        raise ModelError(message("the weight matrix holds NaN or infinity", expected="finite values"))
