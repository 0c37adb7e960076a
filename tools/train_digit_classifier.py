"""Train the digit classifier whose features the digits evaluation uses (about 20 seconds on one CPU core).

    python tools/train_digit_classifier.py

writes ``lakonlab/evaluation/weights/digit_classifier.safetensors`` and its figures beside it, as JSON. The shipped
weights define the metric: numbers measured with other weights are not comparable with them.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path


def augment(images, generator, max_shift=0.5, max_degrees=10.0, max_scale=0.1):
    """Shift (in pixels), rotate and scale each image a little."""
    import torch
    from torch.nn import functional

    def uniform(*shape):
        return torch.rand(*shape, generator=generator) * 2 - 1

    count, size = len(images), images.shape[-1]
    angle, scale = uniform(count) * math.radians(max_degrees), 1 + uniform(count) * max_scale
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = torch.stack([cos, -sin, sin, cos], dim=1).view(count, 2, 2)
    matrix = torch.cat([rows, uniform(count, 2, 1) * (2 * max_shift / size)], dim=2)
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
    return functional.grid_sample(images + 1, grid, align_corners=False) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, help='weights file; the shipped one by default')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--epochs', type=int, default=120)
    parser.add_argument('--batch-size', type=int, default=128)
    args = parser.parse_args()

    import torch
    from safetensors.torch import save_file
    from torch.nn import functional

    from lakonlab.datasets.digits import load_split
    from lakonlab.evaluation.digit_classifier import SHIPPED_WEIGHTS, DigitClassifierNet
    from lakonlab.evaluation.frechet import Moments, frechet_distance
    from lakonlab.storage.local import sha256_of

    torch.set_num_threads(1)  # the tensors are tiny, and the result does not depend on the number of cores
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    images, labels = load_split('train')
    held_out_images, held_out_labels = load_split('val')
    net = DigitClassifierNet()
    steps = args.epochs * len(images) // args.batch_size
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        chosen = torch.randint(len(images), (args.batch_size,), generator=generator)
        logits = net(augment(images[chosen], generator)).logits
        loss = functional.cross_entropy(logits, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 200 == 0 or step + 1 == steps:
            print(f'step {step + 1}/{steps}  loss {loss.item():.4f}', flush=True)

    with torch.no_grad():
        variance = net(images).embedding.double().var(dim=0).mean()
        net.feature_scale.copy_(variance.rsqrt())
        train, held_out = net(images), net(held_out_images)
    moments = [Moments(), Moments()]
    for moment, features in zip(moments, (train, held_out), strict=True):
        moment.update(features.embedding)
    path = args.out or SHIPPED_WEIGHTS
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, path)
    figures = dict(
        command=f'python tools/train_digit_classifier.py --seed {args.seed} --epochs {args.epochs}'
        f' --batch-size {args.batch_size}',
        sha256=sha256_of(path),
        seed=args.seed,
        steps=steps,
        torch=torch.__version__,
        parameters=sum(parameter.numel() for parameter in net.parameters()),
        feature_dim=train.embedding.shape[1],
        train_images=len(images),
        train_accuracy=(train.logits.argmax(dim=1) == labels).double().mean().item(),
        held_out_images=len(held_out_images),
        held_out_accuracy=(held_out.logits.argmax(dim=1) == held_out_labels).double().mean().item(),
        frechet_distance_train_to_held_out=frechet_distance(
            moments[0].mean(), moments[0].covariance(), moments[1].mean(), moments[1].covariance()
        ),
    )
    path.with_suffix('.json').write_text(json.dumps(figures, indent=1) + '\n', encoding='utf-8')
    print(json.dumps(figures, indent=1))
    print(f'wrote {path} ({path.stat().st_size:,} bytes)')


if __name__ == '__main__':
    main()
