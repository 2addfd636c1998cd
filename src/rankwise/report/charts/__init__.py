"""Charts of runs: records in, Vega-Lite specifications out. Each number in a chart is the record's own."""
