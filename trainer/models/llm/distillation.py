"""Distillation, which LLM-SRec adds to retrieval: the teacher's user vector as a target (KDD'25, §3.2).

Letters: B users of the global batch, D projected width.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config import LLMSRecConfig
from trainer.nn import losses
from trainer.nn.projectors import teacher_head


class Distillation(nn.Module):
    """f_CF-user, and the losses between its vectors and those of the LLM."""

    def __init__(self, config: LLMSRecConfig, teacher_dim: int) -> None:
        super().__init__()
        self.config = config
        self.teacher_head = teacher_head(teacher_dim, config.projected_dim)

    def forward(self, teacher_BD: Tensor) -> Tensor:
        """(B, D) f_CF-user(O_u), the projected user vectors of the teacher."""
        projected_BD: Tensor = self.teacher_head(teacher_BD)
        return projected_BD

    def loss(self, student_BD: Tensor, teacher_BD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum of distillation (Equation 2 or 10) and uniformity (Equation 3), and both unweighted by name."""
        if self.config.distill_normalize:
            student_BD, teacher_BD = F.normalize(student_BD, dim=-1), F.normalize(teacher_BD, dim=-1)
        distillation = self._distance(student_BD, teacher_BD).mean()
        uniformity = losses.uniformity(student_BD) + losses.uniformity(teacher_BD)
        total = self.config.distill_weight * distillation + self.config.uniformity_weight * uniformity
        return total, {"distillation": distillation, "uniformity": uniformity}

    def _distance(self, student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
        if self.config.distillation == "mse":
            return losses.distillation(student_BD, teacher_BD, self.config.mse_reduction)
        return losses.contrastive_distillation(
            student_BD, teacher_BD, self.config.contrastive_temperature, self.config.contrastive_symmetric
        )
