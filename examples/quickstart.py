"""Dense -> PESC MoE -> trained -> used, in minutes on a CPU: python examples/quickstart.py"""

import sparsecraft as sc
from sparsecraft.data.corpus import demo
from sparsecraft.dense import hub
from sparsecraft.dense.loading import load_tokenizer
from sparsecraft.serving.generation import answer

model, tokenizer = hub.load_dense("smollm2"), load_tokenizer(hub.resolve("smollm2"))
report = sc.convert(model, sc.recipes.camelidae(adapter_dim=64, lora_rank=8, dropout=0.0))
print(report.certificate)

math = demo("runs/quickstart/data")["math"]
sc.train(model, math["train"], "runs/quickstart/sft", steps=20, max_length=256, learning_rate=1e-3)
print(sc.evaluate(model, math["heldout"], limit=32)["loss"])

with sc.trace(model) as routing:
    question = "Ann has 7 pens and buys 5 more. How many pens has she now?"
    print(answer(model, tokenizer, [{"role": "user", "content": question}]))
for layer, decision in list(routing.items())[:3]:
    print(layer, decision.load_E())
