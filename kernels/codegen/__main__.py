"""Write the generated sources beside those that include them: `python -m rung.kernels.codegen`."""

from rung.kernels.codegen import sources

for path, text in sources().items():
    path.write_text(text)
