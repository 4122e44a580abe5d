"""CAME (Luo et al., ACL 2023) as a composable Optax gradient transformation."""

from came_optax._came import came, steady_came
from came_optax._codes import Codes
from came_optax._confidence import ScaleByConfidenceState, scale_by_confidence
from came_optax._conversion import conversion_report, convert_state
from came_optax._conversion_report import ConversionReport
from came_optax._factored_axes import FactoredAxes, FactoringRule
from came_optax._factored_moment import (
    ScaleByFactoredMomentState,
    scale_by_factored_moment,
)
from came_optax._factoring import (
    BalancedSplit,
    ByPath,
    LargestTwoAxes,
    LastTwoAxes,
    Stacked,
)
from came_optax._master_weights import (
    MasterWeightsState,
    master_weights,
    split_weights,
    with_master_weights,
)
from came_optax._memory import StateMemory, state_memory
from came_optax._muon import came_muon
from came_optax._muon_dimensions import ByMuonDimensionNumbers
from came_optax._muon_update import CameMuonState
from came_optax._orthogonalize import orthogonalize
from came_optax._quantized_ema import QuantizedEmaState, quantized_ema
from came_optax._scale_by_came import ScaleByCameState, scale_by_came
from came_optax._sharding import state_sharding
from came_optax._version import __version__

__all__ = [
    "BalancedSplit",
    "ByMuonDimensionNumbers",
    "ByPath",
    "CameMuonState",
    "Codes",
    "ConversionReport",
    "FactoredAxes",
    "FactoringRule",
    "LargestTwoAxes",
    "LastTwoAxes",
    "MasterWeightsState",
    "QuantizedEmaState",
    "ScaleByCameState",
    "ScaleByConfidenceState",
    "ScaleByFactoredMomentState",
    "Stacked",
    "StateMemory",
    "__version__",
    "came",
    "came_muon",
    "conversion_report",
    "convert_state",
    "master_weights",
    "orthogonalize",
    "quantized_ema",
    "scale_by_came",
    "scale_by_confidence",
    "scale_by_factored_moment",
    "split_weights",
    "state_memory",
    "state_sharding",
    "steady_came",
    "with_master_weights",
]
