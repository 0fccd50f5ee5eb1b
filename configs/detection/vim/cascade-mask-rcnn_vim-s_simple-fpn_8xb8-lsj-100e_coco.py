"""Cascade Mask R-CNN on Vim-S, 100 epochs of COCO: not published."""

_base_ = "../_base_/cascade-mask-rcnn_simple-fpn_8xb8-lsj-100e_coco.py"

model = dict(
    backbone=dict(model_name="vim_small_patch16_224", out_indices=[23], rope="stream"),
    neck=dict(in_channels=384),
)

decay = 0.837  # of the learning rate, from each block to the one before it
rates = [decay ** (24 - i) for i in range(24)]
custom_keys = {f"blocks.{i}.": dict(lr_mult=rate) for i, rate in enumerate(rates)}
custom_keys.update({f"blocks.{i}.norm": dict(lr_mult=rate, decay_mult=0.0) for i, rate in enumerate(rates)})
custom_keys.update(
    patch_embed=dict(lr_mult=decay**25), cls_token=dict(lr_mult=decay**25),
    pos_embed=dict(lr_mult=decay**25, decay_mult=0.0), norm=dict(decay_mult=0.0),
)  # fmt: skip
optim_wrapper = dict(
    type="AmpOptimWrapper",
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1),
    paramwise_cfg=dict(custom_keys=custom_keys),
)
