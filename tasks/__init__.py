"""The test sets beside GSM8K, one scorer a file: HumanEval-X, and question answering by HELM."""
