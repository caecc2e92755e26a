"""The page of a plan without its plan: HTML, style and script in one text.

@TITLE@, @TABLE@ and @DATA@ are filled in. Two drawings share a hand: the wheel zooms around the pointer, dragging
moves, a double click shows everything, hovering names what is under the pointer.
"""

PAGE = r"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>@TITLE@</title><style>
body{font:14px system-ui,sans-serif;margin:16px;color:#222;background:#fff}
h1{font-size:18px;margin:0 0 4px}h2{font-size:15px;margin:16px 0 4px}p{margin:4px 0;color:#555}
canvas{width:100%;border:1px solid #bbb;display:block;cursor:crosshair}
#space{height:460px}#lanes{height:130px}pre{font-size:12px;background:#f6f6f6;padding:8px;overflow:auto}
#tip{position:fixed;pointer-events:none;background:#222;color:#fff;padding:4px 8px;border-radius:4px;font-size:12px;
white-space:pre;display:none;z-index:2}
</style></head><body><h1>@TITLE@</h1>
<h2>Where bytes live: address over time</h2>
<p id="said"></p><canvas id="space"></canvas>
<h2>Compute and copies, in seconds</h2><canvas id="lanes"></canvas>
<p>Wheel: zoom. Drag: move. Double click: everything. A rectangle's colour is its block's.</p>
<h2>The plan</h2><pre>@TABLE@</pre><div id="tip"></div>
<script>
"use strict";
const D=@DATA@,tip=document.getElementById("tip"),LANES=["compute","to host","to device"];
const gib=b=>b>=2**30?(b/2**30).toFixed(2)+" GiB":b>=2**20?(b/2**20).toFixed(2)+" MiB":(b/1024).toFixed(1)+" KiB";
const blockOf=n=>{const m=n.match(/[^ ]*\d[^ ]*/);return m?m[0]:n};
const hues=new Map();
function colour(name,light){if(!hues.has(name))hues.set(name,hues.size*137.5%360);
  return `hsl(${hues.get(name)},60%,${light}%)`}
function view(id,world,paint,hit){
  const c=document.getElementById(id),g=c.getContext("2d");let v={...world},drag=null;
  const px=e=>{const r=c.getBoundingClientRect();return[e.clientX-r.left,e.clientY-r.top]};
  const X=x=>(x-v.x0)/(v.x1-v.x0)*c.clientWidth,Y=y=>c.clientHeight-(y-v.y0)/(v.y1-v.y0)*c.clientHeight;
  const ux=p=>v.x0+p/c.clientWidth*(v.x1-v.x0),uy=p=>v.y0+(c.clientHeight-p)/c.clientHeight*(v.y1-v.y0);
  function draw(){const d=devicePixelRatio||1;c.width=c.clientWidth*d;c.height=c.clientHeight*d;g.scale(d,d);
    g.clearRect(0,0,c.clientWidth,c.clientHeight);c.dataset.drawn=paint(g,X,Y,c)}
  c.addEventListener("wheel",e=>{e.preventDefault();const[p,q]=px(e),f=e.deltaY>0?1.25:.8,x=ux(p),y=uy(q);
    v={x0:x-(x-v.x0)*f,x1:x+(v.x1-x)*f,y0:world.fixed?v.y0:y-(y-v.y0)*f,y1:world.fixed?v.y1:y+(v.y1-y)*f};draw()},
    {passive:false});
  c.addEventListener("mousedown",e=>drag=px(e));addEventListener("mouseup",()=>drag=null);
  c.addEventListener("dblclick",()=>{v={...world};draw()});
  c.addEventListener("mouseleave",()=>tip.style.display="none");
  c.addEventListener("mousemove",e=>{const[p,q]=px(e);
    if(drag){const a=ux(drag[0])-ux(p),b=world.fixed?0:uy(drag[1])-uy(q);
      v={x0:v.x0+a,x1:v.x1+a,y0:v.y0+b,y1:v.y1+b};drag=[p,q];draw()}
    const text=hit(ux(p),uy(q));tip.style.display=text?"block":"none";tip.textContent=text||"";
    tip.style.left=Math.min(e.clientX+12,innerWidth-320)+"px";tip.style.top=e.clientY+14+"px"});
  addEventListener("resize",draw);draw();
}
const end=D.rows.reduce((m,r)=>Math.max(m,r[2]),1);
view("space",{x0:0,x1:end,y0:0,y1:Math.max(D.arena,1)*1.06},(g,X,Y,c)=>{
  let n=0;
  for(const[name,a,b,size,at]of D.rows){const x=X(a),w=Math.max(X(b)-x,.4),y=Y(at+size),h=Math.max(Y(at)-y,.4);
    if(x+w<0||x>c.clientWidth||y+h<0||y>c.clientHeight)continue;
    g.fillStyle=colour(blockOf(name),name.startsWith("forward")||name.startsWith("backward")?72:52);g.fillRect(x,y,w,h);n++;
    if(w>3&&h>3){g.strokeStyle="rgba(0,0,0,.25)";g.strokeRect(x,y,w,h)}
    if(w>70&&h>13){g.fillStyle="#111";g.font="11px system-ui";g.fillText(name,x+4,y+12,w-8)}}
  g.strokeStyle="#000";g.lineWidth=1.4;g.beginPath();let last=0;
  for(const[t,load]of D.load){g.lineTo(X(t),Y(last));g.lineTo(X(t),Y(load));last=load}g.stroke();
  g.setLineDash([6,4]);g.strokeStyle="#c00";g.beginPath();g.moveTo(0,Y(D.bound));g.lineTo(c.clientWidth,Y(D.bound));
  g.stroke();g.setLineDash([]);g.lineWidth=1;g.fillStyle="#c00";g.font="12px system-ui";
  g.fillText("lower bound "+gib(D.bound),6,Y(D.bound)-4);return n},
 (t,y)=>{const r=D.rows.find(r=>r[1]<=t&&t<r[2]&&r[4]<=y&&y<r[4]+r[3]);
  return r?`${r[0]}\n${gib(r[3])} at ${gib(r[4])}\nevents ${r[1]} to ${r[2]}`:""});
const seconds=D.bars.reduce((m,b)=>Math.max(m,b[4]),1e-9);
view("lanes",{x0:-seconds*.06,x1:seconds*1.01,y0:0,y1:3,fixed:true},(g,X,Y,c)=>{let n=0;
  for(const[lane,block,what,a,b]of D.bars){const k=2-LANES.indexOf(lane),x=X(a),w=Math.max(X(b)-x,.4);
    g.fillStyle=block?colour(block,what==="rerun"?38:what==="backward"?60:72):"#999";
    g.fillRect(x,Y(k+.88),w,Y(k+.12)-Y(k+.88));n++;
    if(w>50){g.fillStyle="#111";g.font="11px system-ui";g.fillText(what+" "+block,x+3,Y(k+.45),w-6)}}
  g.fillStyle="#222";g.font="12px system-ui";LANES.forEach((name,i)=>g.fillText(name,4,Y(2-i+.5)+4));return n},
 (t,y)=>{const lane=LANES[2-Math.floor(y)],b=D.bars.find(b=>b[0]===lane&&b[3]<=t&&t<b[4]);
  return b?`${b[2]} ${b[1]}\n${(b[4]-b[3]).toPrecision(4)} s, from ${b[3].toPrecision(4)} s on`:""});
document.getElementById("said").textContent=D.rows.length?
  `${D.rows.length} requests in ${gib(D.arena)}; black: bytes alive, red: the most that is alive at once. `+
  "Time is counted in allocations and frees. Weights and optimizer states are not drawn.":
  "This plan says what happens to each byte, not where it lives: memo plan makes plans with addresses.";
</script></body></html>
"""
