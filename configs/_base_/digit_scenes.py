"""What the recipes on the digit scenes of ``tools/make_digit_scenes.py`` share: their reading, and AdamW on one GPU."""

data_root = "data/digit_scenes/"
train_dataloader = dict(batch_size=16, num_workers=8, persistent_workers=True, dataset=dict(data_root=data_root))
val_dataloader = dict(
    batch_size=8,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(data_root=data_root),
)
test_dataloader = val_dataloader

val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=3e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
randomness = dict(seed=0)
