"""Gymnasium environments in which an agent learns what to remove from a network; importing registers them."""

import gymnasium

gymnasium.register(id="secateur/NetworkCompression-v0", entry_point="envs.network_env:NetworkEnv")
gymnasium.register(id="secateur/LayerwiseCompression-v0", entry_point="envs.layerwise_env:LayerwiseEnv")
