"""The measuring rod: the same training step under different memory managers, as rows with provenance.

    python -m benchmarks.harness --run NAME --out FILE --geometry llama-8b --blocks 4 --lengths 16K,32K

    parent (runner, no torch)              child, one per contender (worker)
      what is missing in FILE   -- job -->   build the model, walk the lengths upward
      append, with provenance  <-- rows --   until done, out of memory, or out of time
      table

``docs/benchmarks.md`` says what is measured and how to read a row.
"""
