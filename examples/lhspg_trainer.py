"""Prune a language model with transformers' Trainer; interrupted, the same command goes on from its checkpoint.

python examples/lhspg_trainer.py runs/trainer
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import graphprune as gp

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/trainer")
folder.mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=64, tie_word_embeddings=True,
)  # fmt: skip
model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules="all-linear"))
lines = [torch.arange(start, start + 24).remainder(60) for start in (0, 30)]
data = [{"input_ids": line, "labels": line} for line in lines]

groups = gp.node_groups(gp.trace(model, {"input_ids": lines[0][None]}))
optimizer = gp.LHSPG(
    gp.param_groups(model, groups), lr=1e-2, remove=0.2, warmup_steps=6, periods=3, period_steps=8
)
settings = TrainingArguments(
    str(folder), max_steps=optimizer.schedule_steps + 6, per_device_train_batch_size=1,
    gradient_accumulation_steps=2, save_steps=10, logging_steps=6, report_to="none", use_cpu=True,
)  # fmt: skip
trainer = Trainer(
    model,
    settings,
    train_dataset=data,
    optimizers=(optimizer, None),
    callbacks=[gp.LHSPGCallback(optimizer)],
)
trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))

optimizer.close()
small = gp.shrink(model, groups, optimizer.plan, {"input_ids": lines[0][None]}).merge_and_unload()
before, after = (sum(p.numel() for p in one.parameters()) for one in (LlamaForCausalLM(config), small))
print(f"{before:,} → {after:,} parameters; the plan is in {folder / 'plan.json'}")
