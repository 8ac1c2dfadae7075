"""Generate text from an exported folder with onnxruntime-genai, token by token.

pip install onnxruntime-genai
python examples/genai_generate.py runs/demo/onnx "The capital of France is"
"""

import sys

import onnxruntime_genai as og

folder, prompt = sys.argv[1:]
model = og.Model(folder)
tokenizer = og.Tokenizer(model)
settings = og.GeneratorParams(model)
ids = tokenizer.encode(prompt)
settings.set_search_options(max_length=len(ids) + 40, do_sample=False)

generator = og.Generator(model, settings)
generator.append_tokens(ids)
stream = tokenizer.create_stream()
print(prompt, end="", flush=True)
while not generator.is_done():
    generator.generate_next_token()
    print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)
print()
