"""What ships with a converted model: blocks, routers, the dial, and the model class around a stock one.

Everything here is copied into exported folders, so it imports torch, transformers, safetensors and ``dynaconv.kernels``
and nothing else of ours, always as ``from dynaconv.<package>.<module> import <names>``.
"""
