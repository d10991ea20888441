#!/usr/bin/env bash
# The README's picture: reads what `snifctl demo` prints, writes a terminal that shows it as SVG.
# See `make demo-picture`. It leaves out the raw map and the middle of the packets, and cuts what is too wide.
set -euo pipefail

awk -v columns=100 -v first=7 -v last=4 '
function escaped(text) {
	gsub(/&/, "\\&amp;", text); gsub(/</, "\\&lt;", text); gsub(/>/, "\\&gt;", text)
	return text
}
function span(class, text) { return text == "" ? "" : "<tspan class=\"" class "\">" escaped(text) "</tspan>" }
function put(content) { lines[++count] = content }

# A heading: what is said in blue, what is typed after "$ " as at a prompt; broken at spaces where it is too wide.
function heading(text,    at, words, n, i, line) {
	put("")
	at = index(text, "$ ")
	if (at > 1) put(span("say", substr(text, 1, at - 1)))
	if (at) { put(span("prompt", "$ ") span("typed", substr(text, at + 2))); return }
	n = split(text, words, " ")
	for (i = 1; i <= n; i++) {
		if (length(line " " words[i]) > columns) { put(span("say", line)); line = words[i] }
		else line = line (line == "" ? "" : " ") words[i]
	}
	put(span("say", line))
}

# A part of a line that a pattern finds stands out.
function marked(text, pattern, class) {
	if (!match(text, pattern)) return span("text", text)
	return span("text", substr(text, 1, RSTART - 1)) span(class, substr(text, RSTART, RLENGTH)) \
		span("text", substr(text, RSTART + RLENGTH))
}
function shown(text) { return length(text) > columns ? substr(text, 1, columns - 1) "…" : text }
function packet(text) { put(marked(shown(text), " (ARP|TCP|UDP|ICMP|ICMPv6|ECHO) ", "kind")) }

function end_packets(    i) {
	for (i = 1; i <= packets; i++) {
		if (i <= first || i > packets - last) packet(packet_line[i])
		else if (i == first + 1) put(span("dim", "    ⋮"))
	}
	packets = 0
}

/^== / { end_packets(); raw = /map dump/; if (!raw) heading(substr($0, 4)); next }
raw || /^$/ { next }
/^ +[0-9]+ +[0-9]+\.[0-9]+ / { packet_line[++packets] = $0; next }
/^  (TAP|REMOTE) / { put(span("dim", shown($0))); next }
/drops: none/ { put(marked($0, "none", "good")); next }
{ put(marked(shown($0), " yes ", "good")) }

END {
	end_packets()
	size = 14; step = 20; cell = 8.43; left = 20; top = 64
	width = int(columns * cell + 2 * left); height = top + 16
	for (i = 1; i <= count; i++) height += lines[i] == "" ? step / 2 : step
	printf "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" width=\"%d\" height=\"%d\">\n", \
		width, height, width, height
	print "<title>snifctl demo</title>"
	print "<style>"
	print "text { font: " size "px ui-monospace, SFMono-Regular, Menlo, Consolas, \"DejaVu Sans Mono\", monospace;"
	print "\twhite-space: pre; fill: #c9d1d9 }"
	print ".say { fill: #79c0ff } .prompt { fill: #7ee787; font-weight: bold } .typed { fill: #f0f6fc; font-weight: bold }"
	print ".text { fill: #c9d1d9 } .dim { fill: #8b949e } .good { fill: #7ee787 } .kind { fill: #ffa657 }"
	print "</style>"
	printf "<rect width=\"%d\" height=\"%d\" rx=\"10\" fill=\"#0d1117\"/>\n", width, height
	printf "<path d=\"M0 10a10 10 0 0 1 10-10h%da10 10 0 0 1 10 10v26H0z\" fill=\"#21262d\"/>\n", width - 20
	split("#ff5f57 #febc2e #28c840", lights, " ")
	for (i = 1; i <= 3; i++) printf "<circle cx=\"%d\" cy=\"18\" r=\"6\" fill=\"%s\"/>\n", i * 20, lights[i]
	y = top
	printf "<text x=\"%d\" y=\"%d\" xml:space=\"preserve\">%s</text>\n", left, y, \
		span("prompt", "$ ") span("typed", "sudo snifctl demo")
	for (i = 1; i <= count; i++) {
		y += lines[i] == "" ? step / 2 : step
		if (lines[i] != "") printf "<text x=\"%d\" y=\"%d\" xml:space=\"preserve\">%s</text>\n", left, y, lines[i]
	}
	print "</svg>"
}'
