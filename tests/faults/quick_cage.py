"""The program with short heartbeats: what takes half a minute in a cage takes a second or two."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import ironcage_proxy as ic

ic.HEARTBEAT_S, ic.DEAD_S, ic.CATCH_UP_S = 0.3, 1.5, 0.1
sys.exit(ic.main())
