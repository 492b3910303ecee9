"""Snapdragon HTP through QNN: the real compiler and an x86 emulator of the HTP, both in the package onnxruntime-qnn."""

from fraqat_compiler.targets.htp.target import HtpTarget as HtpTarget
