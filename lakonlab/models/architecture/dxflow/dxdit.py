"""DiT student of the DX policy: the teacher's output layer, widened to N predictions.

``B`` batch, ``N`` grid points or polynomial coefficients, ``C`` channels, ``H W`` image size.
"""

from __future__ import annotations

from torch import Tensor, nn

from lakonlab.models.architecture.diffusers.dit import ROW_ORDER, DiTBackbone
from lakonlab.models.architecture.heads import GridHead, require_positive
from lakonlab.models.architecture.network import at_least
from lakonlab.ops.random_source import RandomSource
from lakonlab.registry import MODULES


@MODULES.register_module()
class DXDiTTransformer2DModel(DiTBackbone):
    """DiT that predicts N velocities, at the points of a time grid or as coefficients of a polynomial in time.

    Args:
        n_grid: ``N`` points of a grid.
        p_order: ``N`` coefficients of a polynomial; give this or ``n_grid``.
        **backbone: See :class:`~lakonlab.models.architecture.diffusers.dit.DiTBackbone`.

    Raises:
        ValueError: Both or none of ``n_grid`` and ``p_order`` are given.
    """

    output_modules = ('proj_out_1', 'proj_out_2')

    def __init__(self, n_grid: int | None = None, p_order: int | None = None, **backbone):
        super().__init__(**backbone)
        if (n_grid is None) == (p_order is None):
            raise ValueError(f'give either n_grid or p_order, found n_grid={n_grid!r}, p_order={p_order!r}')
        num_points = p_order if n_grid is None else n_grid
        require_positive(**{'p_order' if n_grid is None else 'n_grid': num_points})
        self.head = GridHead(num_points, self.patch_size, ROW_ORDER, polynomial=n_grid is None)
        rows = self.patch_size * self.patch_size * num_points * self.out_channels
        self.proj_out_2 = nn.Linear(self.width, rows)
        self.prepare()

    def init_output_layers(self) -> None:
        """Start from predictions of zero."""
        nn.init.zeros_(self.proj_out_2.weight)
        nn.init.zeros_(self.proj_out_2.bias)

    def remap_pretrained(self, state: dict[str, Tensor], source: RandomSource | None = None) -> dict[str, Tensor]:
        """See the base class; the teacher's output layer is widened."""
        state = super().remap_pretrained(state, source)
        return self.head.from_output_layer(state, 'proj_out_2', self.proj_out_2.out_features)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, source: RandomSource | None = None
    ) -> Tensor:
        """Predict N velocities.

        Args:
            hidden_states: Shape ``(B, C, H, W)``.
            timestep: Shape ``(B,)``, in the unit the network is trained with.
            class_labels: Integers in ``[0, num_embeds_ada_norm]``, shape ``(B,)``; the largest is the null class.
            source: Random source of ``class_dropout`` and ``network_dropout``; None for torch's global state.

        Returns:
            Shape ``(B, N, C, H, W)``.
        """
        with self.autocast(hidden_states.device):
            tokens, _, grid = self.encode(hidden_states, timestep, class_labels, source)
            rows = self.proj_out_2(tokens.to(self.proj_out_2.weight.dtype))
        return at_least(self.head(rows, grid), hidden_states.dtype)
