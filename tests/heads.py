"""SCALE and FRUGAL for tests that know no roles: parameters and groups may come without, and of whatever shape."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

import gradkit


class OneRole(gradkit.Optimizer):
    """Every parameter has one role."""

    role: str

    def __init__(self, params: Any, **given: Any):
        loose = params if isinstance(params, Tensor) else list(params)
        grouped = len(loose) == 0 or isinstance(loose, Tensor) or isinstance(loose[0], dict)
        super().__init__(loose if grouped else [{"params": loose}], **given)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        param_group.setdefault("role", self.role)
        super().add_param_group(param_group)

    def check_parameter(self, p: Tensor, group: Mapping[str, Any]) -> None:
        """Vectors are one output each."""


class LastLayers(OneRole, gradkit.SCALE):
    """SCALE's momentum and normalisation."""

    role = "last"


class Matrices(OneRole, gradkit.FRUGAL):
    """FRUGAL's split; a vector is selected whole."""

    role = "matrix"
