/*
 * Makes frames arrive at the other end of a veth device, as a network card's driver would hand them up: the kernel
 * runs an XDP program that answers XDP_TX on frames of its own (BPF_F_TEST_XDP_LIVE_FRAMES). No process, socket or
 * timer is in the way, and everything that becomes of the frames happens on this CPU.
 *
 *	inject DEV CPU SIZE BATCH FLOWS COUNT BURSTS
 *
 * prints, of each burst of COUNT frames, the nanoseconds a frame. FLOWS > 0 draws the source port of each frame; then
 * the drawing is part of the time.
 */
#include "frame.h"

#include <linux/bpf.h>
#include <net/if.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>

#define INSN(c, d, s, o, i) ((struct bpf_insn){ .code = (c), .dst_reg = (d), .src_reg = (s), .off = (o), .imm = (i) })
#define MOV(d, s) INSN(BPF_ALU64 | BPF_MOV | BPF_X, d, s, 0, 0)
#define LOAD(d, s, o) INSN(BPF_LDX | BPF_MEM | BPF_W, d, s, o, 0)
#define ANSWER_TX INSN(BPF_ALU64 | BPF_MOV | BPF_K, 0, 0, 0, XDP_TX)
#define EXIT INSN(BPF_JMP | BPF_EXIT, 0, 0, 0, 0)

static int bpf(enum bpf_cmd command, union bpf_attr *attr)
{
	return (int)syscall(SYS_bpf, command, attr, sizeof(*attr));
}

static int load(const struct bpf_insn *insns, size_t count)
{
	union bpf_attr attr = {
		.prog_type = BPF_PROG_TYPE_XDP,
		.insns = (uint64_t)(uintptr_t)insns,
		.insn_cnt = (uint32_t)count,
		.license = (uint64_t)(uintptr_t)"GPL",
	};
	int prog = bpf(BPF_PROG_LOAD, &attr);

	if (prog < 0)
		err(1, "BPF_PROG_LOAD");
	return prog;
}

static int load_plain(void)
{
	const struct bpf_insn insns[] = { ANSWER_TX, EXIT };

	return load(insns, sizeof(insns) / sizeof(*insns));
}

static int load_flows(unsigned int flows)
{
	const struct bpf_insn insns[] = {
		MOV(6, 1),
		INSN(BPF_JMP | BPF_CALL, 0, 0, 0, BPF_FUNC_get_prandom_u32),
		INSN(BPF_ALU | BPF_MOD | BPF_K, 0, 0, 0, (int)flows),
		INSN(BPF_ALU | BPF_ADD | BPF_K, 0, 0, 0, 1024),
		LOAD(2, 6, 0),
		LOAD(3, 6, 4),
		MOV(4, 2),
		INSN(BPF_ALU64 | BPF_ADD | BPF_K, 4, 0, 0, HEADERS),
		INSN(BPF_JMP | BPF_JGT | BPF_X, 4, 3, 1, 0),
		INSN(BPF_STX | BPF_MEM | BPF_H, 2, 0, SOURCE_PORT, 0),
		ANSWER_TX,
		EXIT,
	};

	return load(insns, sizeof(insns) / sizeof(*insns));
}

/* The kernel's own measurement: its setting up, some 30 ms, and other processes' turns are not in it. */
static uint32_t run(int prog, unsigned int dev, unsigned char *frame, unsigned int size, unsigned int batch,
		unsigned int count)
{
	struct xdp_md context = { .data_end = size, .ingress_ifindex = dev };
	union bpf_attr attr = {
		.test = {
			.prog_fd = (uint32_t)prog,
			.data_in = (uint64_t)(uintptr_t)frame,
			.data_size_in = size,
			.ctx_in = (uint64_t)(uintptr_t)&context,
			.ctx_size_in = sizeof(context),
			.repeat = count,
			.flags = BPF_F_TEST_XDP_LIVE_FRAMES,
			.batch_size = batch,
		},
	};

	if (bpf(BPF_PROG_TEST_RUN, &attr))
		err(1, "BPF_PROG_TEST_RUN");
	return attr.test.duration;
}

int main(int argc, char **argv)
{
	unsigned char frame[MAX_FRAME];
	unsigned int dev, size, batch, flows, count, bursts;
	int prog;

	if (argc != 8)
		errx(2, "usage: inject DEV CPU SIZE BATCH FLOWS COUNT BURSTS");
	dev = if_nametoindex(argv[1]);
	if (!dev)
		err(1, "%s", argv[1]);
	pin((int)number(argv[2]));
	size = number(argv[3]);
	batch = number(argv[4]);
	flows = number(argv[5]);
	count = number(argv[6]);
	bursts = number(argv[7]);
	make_frame(frame, size, "192.0.2.2", "192.0.2.1");
	prog = flows ? load_flows(flows) : load_plain();
	/* Caches and branch predictors. */
	run(prog, dev, frame, size, batch, batch);
	while (bursts--)
		printf("%u\n", run(prog, dev, frame, size, batch, count));
	return 0;
}
