"""Fine-tunes an encoder on folders of classes, with a loop of one's own: python finetune.py TRAIN VAL [EPOCHS]

`cim evaluate finetune` does it with the whole recipe and goes on after an interruption; this is the least of it.
"""

import sys

import torch
from timm.data import ImageDataset, Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from torch.utils.data import DataLoader

import cim_models

train, val, epochs = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 10
device = "cuda" if torch.cuda.is_available() else "cpu"
images = ImageDataset(train)
classes = len(images.reader.class_to_idx)
model = cim_models.create_model("cim_vit_tiny", pretrained=True, num_classes=classes, fc_norm=True, drop_path_rate=0.1)
model = model.to(device)
images.transform = cim_models.create_transform(model, is_training=True, auto_augment="rand-m9-mstd0.5-mmax9-inc1")
loader = DataLoader(images, batch_size=min(32, len(images) // 2 * 2), shuffle=True, drop_last=True)
mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=classes)
optimiser = torch.optim.AdamW(param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.8), lr=4e-4)
schedule = CosineLRScheduler(optimiser, t_initial=epochs + 1, warmup_t=epochs // 5)  # 0 before and after

for epoch in range(epochs):
    schedule.step(epoch + 1)
    for pictures, labels in loader:
        pictures, targets = mixup(pictures.to(device), labels.to(device))
        loss = SoftTargetCrossEntropy()(model.train()(pictures), targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

tests = ImageDataset(val, class_map=images.reader.class_to_idx, transform=cim_models.create_transform(model))
tests = DataLoader(tests, batch_size=32)
with torch.inference_mode():
    right = sum((model.eval()(x.to(device)).argmax(1).cpu() == y).sum().item() for x, y in tests)
print(f"top-1 {right / len(tests.dataset):.1%}")
