"Times against the plain loop of the released codes; `python -m benchmarks --help`."
