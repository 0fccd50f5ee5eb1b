"""Mask R-CNN on VMamba-T s1l8, from scratch on the digit scenes, in the time that is given: three minutes."""

_base_ = "./mask-rcnn_vmamba-t-s1l8_fpn_1xb16-36e_digit-scenes.py"

model = dict(backbone=dict(drop_path_rate=0.0))
train_dataloader = dict(batch_size=8, sampler=dict(type="InfiniteSampler"))
train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=100000, val_interval=2000)
default_hooks = dict(
    logger=dict(interval=10, log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=2000, max_keep_ckpts=1),
)
log_processor = dict(by_epoch=False)
custom_hooks = [dict(type="TimeBudgetHook", seconds=180, warmup=100)]
