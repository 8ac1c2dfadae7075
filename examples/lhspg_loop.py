"""Prune a language model in a training loop of one's own.

python examples/lhspg_loop.py
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import graphprune as gp

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=64, tie_word_embeddings=True,
)  # fmt: skip
model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules="all-linear"))
text = torch.arange(24).remainder(60).expand(2, -1)  # a text that can be learned

groups = gp.node_groups(gp.trace(model, {"input_ids": text}))
optimizer = gp.LHSPG(
    gp.param_groups(model, groups), lr=1e-2, remove=0.2, warmup_steps=6, periods=3, period_steps=8
)
for step in range(optimizer.schedule_steps + 6):  # the last ones settle
    optimizer.zero_grad()
    student = model(input_ids=text, labels=text)
    with torch.no_grad(), optimizer.gates.opened(), model.disable_adapter():
        teacher = model(input_ids=text).logits.softmax(-1)  # the un-pruned model: the same weights
    distance = torch.nn.functional.kl_div(student.logits.log_softmax(-1), teacher, reduction="batchmean")
    (student.loss + 0.01 * distance).backward()
    optimizer.step()
    if step % 6 == 0:
        print(step, f"loss {float(student.loss.detach()):.3f}", optimizer.counts)

with torch.no_grad():
    expected = model(input_ids=text).logits
optimizer.close()
small = gp.shrink(model, groups, optimizer.plan, {"input_ids": text}).merge_and_unload()
with torch.no_grad():
    error = float((small(input_ids=text).logits - expected).abs().max())
before, after = (sum(p.numel() for p in one.parameters()) for one in (LlamaForCausalLM(config), small))
print(f"{before:,} → {after:,} parameters; cut against gated: {error:.1e}")
