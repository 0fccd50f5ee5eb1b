"""Building blocks that the families share."""

from .selective_ssm import SelectiveSSM, init_dt_bias_, init_s4d_real_

__all__ = ["SelectiveSSM", "init_dt_bias_", "init_s4d_real_"]
