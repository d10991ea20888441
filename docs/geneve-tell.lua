-- SPDX-License-Identifier: MIT OR Apache-2.0
--
-- Wireshark reads with this what `snifctl up --tunnel geneve --tell` says of each copy. For one run:
--
--     wireshark -X lua_script:geneve-tell.lua
--     tshark -X lua_script:geneve-tell.lua -T fields -e snifctl.tap -e snifctl.sequence -r FILE
--
-- For good: copy it into the directory of personal Lua plugins (Help, About Wireshark, Folders).
--
-- The option: class 0xff5a, type 1, 20 bytes in network order. docs/tunnels.md has the table.

local CLASS, TYPE, BYTES = 0xff5a, 1, 20

local snifctl = Proto("snifctl", "snifctl: of a mirrored frame")

local names = { [0] = "ingress", [1] = "egress" }
local f = snifctl.fields
f.tap = ProtoField.uint16("snifctl.tap", "Tap", base.DEC)
f.interface = ProtoField.uint16("snifctl.interface", "Interface, in the order of the session", base.DEC)
f.direction = ProtoField.uint8("snifctl.direction", "Direction", base.DEC, names)
f.cut = ProtoField.bool("snifctl.cut", "Only the first bytes of the frame", 16, nil, 0x0001)
f.time = ProtoField.absolute_time("snifctl.time", "Copied at", base.LOCAL)
f.delay = ProtoField.relative_time("snifctl.delay", "From then to the capture")
f.sequence = ProtoField.uint32("snifctl.sequence", "Number of the copy", base.DEC)
f.missing = ProtoField.uint32("snifctl.missing", "Copies missing before this one", base.DEC)
f.length = ProtoField.uint32("snifctl.length", "Bytes of the frame on the wire", base.DEC)
snifctl.experts.missing =
  ProtoExpert.new("snifctl.missing.expert", "Copies are missing", expert.group.SEQUENCE, expert.severity.WARN)

local frame_time = Field.new("frame.time_epoch")
local option_class = Field.new("geneve.option.class")
local option_type = Field.new("geneve.option.type")
local option_data = Field.new("geneve.option.unknown.data")

local addresses = {
  { Field.new("ip.src"), Field.new("ip.dst") },
  { Field.new("ipv6.src"), Field.new("ipv6.dst") },
}

-- From where the copy was sent to where: the addresses of the first IP header, as pinfo has those of the last one.
local function way()
  local first, found
  for _, fields in ipairs(addresses) do
    local src, dst = fields[1](), fields[2]()
    if src and dst and not (first and first < src.offset) then
      first, found = src.offset, tostring(src.value) .. " " .. tostring(dst.value)
    end
  end
  return found or ""
end

-- The last number of each sender, receiver and tap; and what was missing before a packet, by its number in the file.
local last, missing = {}, {}

function snifctl.init()
  last, missing = {}, {}
end

-- Half of the numbers lie ahead. One that lies behind came late, or its session has begun again.
local function count_missing(pinfo, key, sequence)
  if pinfo.visited then
    return missing[pinfo.number]
  end
  local ahead = last[key] and (sequence - last[key]) % 0x100000000
  if ahead and ahead > 1 and ahead < 0x80000000 then
    missing[pinfo.number] = ahead - 1
  end
  if not ahead or ahead < 0x80000000 or sequence == 0 then
    last[key] = sequence
  end
  return missing[pinfo.number]
end

local function tell(data, pinfo, root)
  local tap = data:range(0, 2)
  local number, sequence = tap:uint(), data:range(12, 4)
  local tree = root:add(snifctl, data)
  tree:add(f.tap, tap)
  tree:add(f.interface, tap, math.floor(number / 2)):set_generated()
  tree:add(f.direction, tap, number % 2):set_generated()
  tree:add(f.cut, data:range(2, 2))
  local time = data:range(4, 8):uint64()
  local seconds, rest = time / 1000000000, time % 1000000000
  time = NSTime.new(seconds:tonumber(), rest:tonumber())
  tree:add(f.time, data:range(4, 8), time)
  tree:add(f.delay, data:range(4, 8), frame_time().value - time):set_generated()
  tree:add(f.sequence, sequence)
  tree:add(f.length, data:range(16, 4))
  local key = way() .. " " .. number
  local lost = count_missing(pinfo, key, sequence:uint())
  if lost then
    local item = tree:add(f.missing, sequence, lost)
    item:set_generated()
    item:add_proto_expert_info(snifctl.experts.missing)
  end
  tree:append_text(string.format(", tap %d %s, number %d", number, names[number % 2], sequence:uint()))
end

function snifctl.dissector(_, pinfo, root)
  local classes, types = { option_class() }, { option_type() }
  for at, class in ipairs(classes) do
    if class.value == CLASS and types[at] and types[at].value == TYPE then
      for _, data in ipairs({ option_data() }) do
        if data.offset == class.offset + 4 and data.len == BYTES then
          tell(data.range, pinfo, root)
        end
      end
    end
  end
end

register_postdissector(snifctl)
