"""Train the demo's checkpoints: one small open_clip CLIP and one expert per task, fine-tuned in its MLPs.

    python tools/train_demo.py --out wemoe_plugin/demo/checkpoints | tee tools/train_demo.log

The base learns all four tasks together for too few steps, so its zero-shot accuracy is middling. Every expert starts
from it and learns one task; only the MLPs of the vision tower move. The text tower stays the base's, so that all
models read the same class names. Seeded: the same versions on the same machine give the same files.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from wemoe_plugin.demo.images import SIZE, TASKS, DrawnTask, draw_images

MODEL_CONFIG: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": SIZE, "layers": 4, "width": 128, "head_width": 32, "patch_size": 8},
    "text_cfg": {
        "context_length": 24,
        "vocab_size": 0,  # set when the tokenizer is trained
        "hf_tokenizer_name": "demo",
        "width": 32,
        "heads": 2,
        "layers": 2,
    },
}
MEAN = STD = (0.5, 0.5, 0.5)
Images = tuple[np.ndarray, np.ndarray]
TRAIN_IMAGES, SCORE_IMAGES = 12_000, 2_000  # per task
TRAIN_SEED, SCORE_SEED = 1_000_001, 1_000_002  # disjoint from the seeds the demo draws with


def train_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer of the demo's captions; the end token has the highest id, as CLIP's pooling expects."""
    captions = [t.format(c) for task in TASKS for t in task.templates for c in task.class_names]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        special_tokens=["<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.add_special_tokens(["<start>", "<end>"])
    start, end = tokenizer.token_to_id("<start>"), tokenizer.token_to_id("<end>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", start), ("<end>", end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<start>", eos_token="<end>", model_max_length=24
    )


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 (n, height, width, 3) to normalised float32 (n, 3, height, width)."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def zero_shot_weights(model: open_clip.CLIP, tokenizer: PreTrainedTokenizerFast, task: DrawnTask) -> Tensor:
    """One unit vector per class, (classes, embed), the mean over the task's templates."""
    vectors = []
    for name in task.class_names:
        tokens = tokenize(tokenizer, [template.format(name) for template in task.templates])
        features = F.normalize(model.encode_text(tokens), dim=-1).mean(0)
        vectors.append(F.normalize(features, dim=-1))
    return torch.stack(vectors)


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    encoded = tokenizer(texts, return_tensors="pt", padding="max_length", max_length=24, truncation=True)
    ids: Tensor = encoded.input_ids
    return ids


@torch.no_grad()
def accuracy(model: open_clip.CLIP, head: Tensor, images: np.ndarray, labels: np.ndarray) -> float:
    model.eval()
    hits = 0
    for start in range(0, len(images), 500):
        features = model.encode_image(to_pixels(images[start : start + 500]))
        hits += int((features @ head.T).argmax(-1).eq(torch.from_numpy(labels[start : start + 500])).sum())
    model.train()
    return hits / len(images)


def train_base(
    model: open_clip.CLIP, tokenizer: PreTrainedTokenizerFast, data: dict[str, Images], steps: int, batch: int
) -> None:
    """Learn every task together: an image against one random prompt of each of the tasks' classes."""
    images = np.concatenate([data[t.name][0] for t in TASKS])
    offsets = np.cumsum([0] + [len(t.class_names) for t in TASKS])
    labels = np.concatenate([data[t.name][1] + offset for t, offset in zip(TASKS, offsets, strict=False)])
    prompts = [[tp.format(c) for tp in t.templates] for t in TASKS for c in t.class_names]
    generator = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        rows = generator.integers(0, len(images), batch)
        texts = [choices[generator.integers(len(choices))] for choices in prompts]
        classes = F.normalize(model.encode_text(tokenize(tokenizer, texts)), dim=-1)
        features = F.normalize(model.encode_image(to_pixels(images[rows])), dim=-1)
        logits = model.logit_scale.exp().clamp(max=100) * features @ classes.T
        loss = F.cross_entropy(logits, torch.from_numpy(labels[rows]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"  base step {step:5d}  loss {loss.item():.3f}", flush=True)


def train_expert(model: open_clip.CLIP, head: Tensor, data: Images, steps: int, batch: int, name: str) -> None:
    """Learn one task against the frozen zero-shot head; only the MLPs of the vision tower move."""
    images, labels = data
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad = parameter_name.startswith("visual.") and ".mlp." in parameter_name
    trained = [p for p in model.parameters() if p.requires_grad]
    generator = np.random.default_rng(1)
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    scale = model.logit_scale.exp().detach()
    for step in range(steps):
        rows = generator.integers(0, len(images), batch)
        features = F.normalize(model.encode_image(to_pixels(images[rows])), dim=-1)
        loss = F.cross_entropy(scale * features @ head.T, torch.from_numpy(labels[rows]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == steps - 1:
            print(f"  {name} step {step:5d}  loss {loss.item():.3f}", flush=True)


def save(model: open_clip.CLIP, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write an ordinary open_clip directory in float16."""
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, directory / "open_clip_model.safetensors", metadata={"format": "pt"})
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": MODEL_CONFIG, "preprocess_cfg": preprocess}
    (directory / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(directory)


def build() -> open_clip.CLIP:
    return open_clip.model.CLIP(**MODEL_CONFIG)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base-steps", type=int, default=600)
    parser.add_argument("--expert-steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=256)
    options = parser.parse_args()

    print(
        f"{datetime.date.today()}  {platform.machine()}  torch {torch.__version__}, open_clip {open_clip.__version__}"
    )
    print(f"base {options.base_steps} steps, experts {options.expert_steps} steps, batch {options.batch}")
    torch.manual_seed(0)
    started = time.perf_counter()
    train = {task.name: draw_images(task, TRAIN_IMAGES, TRAIN_SEED) for task in TASKS}
    score = {task.name: draw_images(task, SCORE_IMAGES, SCORE_SEED) for task in TASKS}
    print(f"drew the images in {time.perf_counter() - started:.0f} s", flush=True)

    tokenizer = train_tokenizer(512)
    MODEL_CONFIG["text_cfg"]["vocab_size"] = len(tokenizer)
    model = build()
    train_base(model, tokenizer, train, options.base_steps, options.batch)
    model.half().float()  # the experts start from what is stored
    save(model, tokenizer, options.out / "base")
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        heads = {task.name: zero_shot_weights(model, tokenizer, task) for task in TASKS}
    base_scores = {task.name: accuracy(model, heads[task.name], *score[task.name]) for task in TASKS}
    print("base", base_scores, flush=True)

    experts = {}
    for task in TASKS:
        torch.manual_seed(0)
        expert = build()
        expert.load_state_dict(base)
        train_expert(expert, heads[task.name], train[task.name], options.expert_steps, options.batch, task.name)
        expert.half().float()
        save(expert, tokenizer, options.out / task.name)
        experts[task.name] = expert.state_dict()
        value = accuracy(expert, heads[task.name], *score[task.name])
        print(f"{task.name}: base {base_scores[task.name]:.3f}  expert {value:.3f}", flush=True)
    print(f"trained in {time.perf_counter() - started:.0f} s")

    merged = {n: t + 0.3 * sum(e[n] - t for e in experts.values()) for n, t in base.items()}
    model.load_state_dict(merged)
    static = {task.name: accuracy(model, heads[task.name], *score[task.name]) for task in TASKS}
    print("task arithmetic at 0.3:", static, "mean", sum(static.values()) / len(static))


if __name__ == "__main__":
    main()
