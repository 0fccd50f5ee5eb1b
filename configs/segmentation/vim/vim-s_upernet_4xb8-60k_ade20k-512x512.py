"""UPerNet on Vim-S, 60k iterations of ADE20K: published mIoU 44.9."""

_base_ = "./_base_/upernet_4xb8-60k_ade20k-512x512.py"

model = dict(
    backbone=dict(model_name="vim_small_patch16_224", rope="stream"),
    neck=dict(channels=384),
    decode_head=dict(in_channels=[384] * 4, channels=384),
    auxiliary_head=dict(in_channels=384),
)

# The authors' decay by layers reaches the embeddings only: it looks for blocks under another name.
embeddings = dict(lr_mult=0.95**25)
optim_wrapper = dict(
    optimizer=dict(lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=dict(patch_embed=embeddings, pos_embed=embeddings)),
)
