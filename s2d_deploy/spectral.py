"""The leading singular triplets of a layer's weight.

A Linear weight is the matrix [N, K] it is; a Conv weight [O, I / groups, *kernel] is read as
[O, I / groups * prod(kernel)], the matrix that multiplies one unfolded patch. With W = U S V^T,
S2D needs only the top few triplets, so `top_triplets` runs a restarted block Krylov iteration,
warm-started by the last V, and accepts its answer on two measured facts: the residual of every
triplet, and a Cholesky factorization which proves that no larger singular value was missed.
Where either fails, the full SVD answers. Nothing is lost but time; a singular *vector* is only as
exact as residual / gap, so nearly equal singular values give vectors that may mix among themselves.

Source of the iteration: Musco and Musco, "Randomized block Krylov methods", arXiv 1504.05477, algorithm 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2d_deploy.errors import ModelError, message

# Below this size the full SVD takes a few tens of milliseconds at most, and is exact.
SMALL = 256
OVERSAMPLE = 8
DEPTH = 4
MAX_RESTARTS = 12
# ||W^T u - s v|| <= RESIDUAL * s_1. An FP32 product of this length already errs by about 2e-6 * s_1.
RESIDUAL = 1e-5
# A missed singular value may exceed s_k by this share: the margin over the FP32 rounding of the certificate.
MARGIN = 1e-3

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
    found = {name: module for name, module in model.named_modules() if isinstance(module, LAYER_TYPES)}
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


def weight_matrix(layer: WeightedLayer) -> Tensor:
    """The layer's weight as a detached float32 matrix [N, K]; Conv: [O, I / groups * prod(kernel)]."""
    return layer.weight.detach().flatten(1).float()


def require_finite_weights(layers: dict[str, WeightedLayer]) -> None:
    """Check every weight.

    Raises:
        ModelError: names every layer whose weight holds NaN or infinity.
    """
    broken = [name for name, layer in layers.items() if not bool(torch.isfinite(layer.weight).all())]
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
    if min(w.shape) > max(SMALL, DEPTH * (k + OVERSAMPLE)):
        found = _block_krylov(w, k, warm)
        if found is not None and is_leading(w, found):
            return found
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    return Triplets(u[:, :k].contiguous(), s[:k].contiguous(), vh[:k].T.contiguous())


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


def _block_krylov(w: Tensor, k: int, warm: Tensor | None) -> Triplets | None:
    """Restarted block Krylov iteration on W^T W; None when the residual stays too large."""
    width = k + OVERSAMPLE
    # Random columns see every direction, so that a triplet which the warm start knows nothing of can appear.
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(w.shape[1], width, generator=generator).to(w.device)
    if warm is not None:
        known = min(k, warm.shape[1])
        block[:, :known] = warm[:, :known].to(block)
    for _ in range(MAX_RESTARTS):
        basis, _ = torch.linalg.qr(block)
        newest = basis
        for _ in range(DEPTH - 1):
            newest = w.T @ (w @ newest)
            for _ in range(2):  # once is not enough in FP32: the rest is of the size of its rounding error
                newest = newest - basis @ (basis.T @ newest)
            newest, _ = torch.linalg.qr(newest)
            basis = torch.cat([basis, newest], dim=1)
        u, s, rh = torch.linalg.svd(w @ basis, full_matrices=False)  # Rayleigh-Ritz: [N, DEPTH * width], small
        block = basis @ rh.T[:, :width]
        found = Triplets(u[:, :k].contiguous(), s[:k].contiguous(), block[:, :k].contiguous())
        error = (w.T @ found.U - found.V * found.S).norm(dim=0).max()
        if float(error) <= RESIDUAL * float(s[0]):
            return found
    return None


def _require_matrix(weight: Tensor) -> None:
    if weight.dim() != 2 or 0 in weight.shape:
        raise ModelError(message("not a weight matrix", expected="[N, K]", found=f"shape {list(weight.shape)}"))
    if not bool(torch.isfinite(weight).all()):
        raise ModelError(message("the weight matrix holds NaN or infinity", expected="finite values"))
