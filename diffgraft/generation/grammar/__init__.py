"""The grammar of prompts: that of webui by default, that of ComfyUI on request.

A prompt is read in this order: choices and wildcards (`choices`), tags such as ``<lora:name:0.8>`` (`tags`), parts
joined by ``AND`` (`composition`), texts that change between steps (`schedule`), and weights of words (`attention`). The
text is then cut into chunks of tokens (`chunks`) and encoded (`encode`). The rules are those of webui 1.10
(``modules/prompt_parser.py``, ``modules/extra_networks.py``) and of ComfyUI's ``sd1_clip.py``.
"""
