"""UPerNet on VMamba-T s1l8, from scratch on the digit scenes, in the time that is given: three minutes."""

_base_ = "./vmamba-t-s1l8_upernet_1xb16-4k_digit-scenes-256x256.py"

class_weight = [0.2] + [1.0] * 10  # fourteen pixels of fifteen are background
model = dict(
    backbone=dict(drop_path_rate=0.0),
    decode_head=dict(channels=128, dropout_ratio=0.0, loss_decode=dict(class_weight=class_weight)),
    auxiliary_head=dict(channels=128, dropout_ratio=0.0, loss_decode=dict(class_weight=class_weight, loss_weight=1.0)),
)
train_dataloader = dict(batch_size=64)
optim_wrapper = dict(optimizer=dict(lr=1.5e-3))
train_cfg = dict(max_iters=100000, val_interval=5000)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=5000))
custom_hooks = [dict(type="TimeBudgetHook", seconds=180, warmup=100)]
