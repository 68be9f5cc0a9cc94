"""What leaves the toolkit: merged models, exports, a server, repositories on the Hub.

In: a finished run or an adapter (`adapter.finished.FinishedRun`). Out: the merged model (`merge`);
the adapter for another program (`export`: portable PEFT, GGUF, Ollama, MLX); an OpenAI-compatible
API (`serve`); a pushed or pulled repository with its model card (`hub`, `card`). An export is
loaded by the program that it is meant for and compared before its folder appears (for Ollama by
llama.cpp; for MLX only where it is installed). No code or pickle of a repository is executed;
nothing is uploaded before it was scanned for secrets.
"""
