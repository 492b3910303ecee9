"""Snapdragon devices in Qualcomm AI Hub, through its own client, the package qai-hub."""

from fraqat_compiler.targets.aihub.target import AiHubTarget as AiHubTarget
