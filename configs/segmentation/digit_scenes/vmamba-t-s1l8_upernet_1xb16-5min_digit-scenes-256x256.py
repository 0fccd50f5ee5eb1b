"""UPerNet on VMamba-T s1l8, from scratch on the digit scenes, in the time that is given: five minutes."""

_base_ = "./vmamba-t-s1l8_upernet_1xb16-4k_digit-scenes-256x256.py"

train_cfg = dict(max_iters=100000)
default_hooks = dict(logger=dict(interval=10))
custom_hooks = [dict(type="TimeBudgetHook", seconds=270)]
