"""A server that speaks AI Hub's protocol on the loopback, for the unmodified client `qai_hub`.

Its compile jobs compile with the real library, its inference jobs run the binary in the real emulator. Files travel
through a second port, as AI Hub's travel through a storage service.
"""

from aihub_server.hub import TOKEN as TOKEN
from aihub_server.hub import AiHubServer as AiHubServer
from aihub_server.web import Fault as Fault
